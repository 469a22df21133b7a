"""Starts the product as a user does, in the foreground of a child process, and stops it with Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
READY_S = 240.0
STOP_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server. started_at: Unix time of its process; ready_s: from then to a healthy answer.

    log: its terminal output.
    """

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    started_at: float
    ready_s: float

    def get(self, path: str) -> Any:
        """The JSON of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def pids(self) -> list[int]:
        """Every process of the server, the child itself included."""
        parent = psutil.Process(self.process.pid)
        return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: list[str], port: int, log: Path, health: str = "/health", environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Run `command` until the block ends, then press Ctrl-C and insist that nothing is left.

    environment: variables beside this process's own. Unless it names a Ray cluster the command starts one: neither a
    running one nor what an interrupted run left behind on the machine is joined.

    Raises:
        RuntimeError: it ended or was not healthy in time; the message holds the end of its output.
    """
    own = {**os.environ, "RAY_ADDRESS": "local"}
    started_at = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**own, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, url + health, log)
        server = Server(url, port, process, log, started_at, time.time() - started_at)
        yield server
    finally:
        _stop(process)


def launch(config: Path, port: int) -> list[str]:
    """What `make serve` runs."""
    return [sys.executable, "-m", "deployments.launch", str(config), "--port", str(port)]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"not healthy (exit status {process.poll()}):\n{log.read_text()[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C; whatever does not end by itself is killed, so that a failing test leaves nothing running either."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for child in children:
                child.kill()
            process.kill()
            process.wait()


def wait_for(condition: Any, timeout_s: float, what: str) -> Any:
    """The first true answer of `condition()`; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")

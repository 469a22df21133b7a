"""A server and everything it starts: run, awaited by its `/health`, and stopped by Ctrl-C, as a user does.

Knows processes and one path of HTTP; what is served, and by which command, is the caller's business.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cluster.config import project_root

READY_S, ANSWER_S, POLL_S = 180.0, 5.0, 0.1
STOP_S, LEFT_S, INSIST_S = 60.0, 2.0, 5.0
LOG_TAIL_CHARS = 4000


class Server:
    """The running command. url: its root, on the loopback interface. `running` makes and stops it."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=project_root(),
                # A cluster of its own, whatever else runs on the machine or was left there.
                env={
                    **os.environ,
                    "RAY_ADDRESS": "local",
                    "HF_HUB_OFFLINE": "1",
                    "RAY_USAGE_STATS_ENABLED": "0",
                    **environment,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def process(self) -> psutil.Process:
        """The command itself; everything else descends from it."""
        return psutil.Process(self._process.pid)

    def pids(self) -> list[int]:
        """Of all its processes."""
        return [self._process.pid, *(child.pid for child in self.process.children(recursive=True))]

    def await_health(self) -> None:
        """Return as soon as `/health` is 200.

        Raises:
            RuntimeError: it ended, or was not healthy in time; the message holds the end of its output.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=ANSWER_S):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)
        tail = self._log.read_text()[-LOG_TAIL_CHARS:]
        raise RuntimeError(f"not healthy (exit status {self._process.poll()}):\n{tail}")

    def stop(self) -> int:
        """Ctrl-C; what is left then is asked to end, and then killed. Returns how many processes those were."""
        if self._process.poll() is not None:
            return 0
        started = self.process.children(recursive=True)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(started, timeout=LEFT_S)
        number = len(left)
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, timeout=INSIST_S)
        return number


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str],
    *,
    may_leave_processes: bool = False,
) -> Iterator[Server]:
    """Started when the block begins, which need not be healthy yet, and stopped when it ends.

    environment: goes before this process's own. may_leave_processes: bare `serve run` does, after its end.

    Raises:
        RuntimeError: processes were left that must not be; they no longer run.
    """
    server = Server(command, port, log, environment)
    try:
        yield server
    finally:
        left = server.stop()
    if left and not may_leave_processes:
        raise RuntimeError(f"{left} processes of the server outlived it and were ended")


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

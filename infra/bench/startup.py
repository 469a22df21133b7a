"""How soon things start: the whole application, and one more expert replica, each against the same without weights.

The whole: `serve run` of the demo to the first token, against an application of the same shape that loads nothing
(`weightless_app`), to the first answer of its router. One more replica: see `added_replica`, on the same running demo.
Also what a replica's imports take, which are most of its start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.config import project_root
from infra.bench import models
from infra.bench.added_replica import Client, added_replica
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate
from infra.bench.serving import free_port

WEIGHTLESS = {"name": "weightless", "route_prefix": "/", "import_path": "infra.bench.weightless_app:build"}
TARGET = 1.3
START_ROUNDS, IMPORT_ROUNDS = 1, 2
POLL_S, ANSWER_S, IMPORT_S, READY_S, STOP_S, LEFT_S = 0.1, 5.0, 60.0, 180.0, 60.0, 5.0
LOG_TAIL_CHARS = 4000

EXPERT_IMPORTS = (
    "deployments.experts.deployment",
    "deployments.experts.replica",
    "cluster.fabric.ray_references",
    "cluster.fabric.store_codec",
)
"""What a replica of experts-N imports, at once and in its constructor."""
BARE_IMPORTS = ("ray.serve", "torch")


def run(context: Context) -> Iterable[Figure]:
    """About two minutes; nothing in a smoke run, as all of it needs Ray."""
    if context.smoke:
        return
    context.progress("startup: imports")
    yield _imports()
    weightless_s, first_token_s = [], []
    for number in range(1, START_ROUNDS + 1):
        context.progress("startup: the application without weights")
        with _served(context, WEIGHTLESS) as (_, healthy_s):
            weightless_s.append(healthy_s)
        context.progress("startup: the demo")
        application = models.demo().application
        with _served(context, application) as (server, healthy_s):
            client = Client(server.url, models.demo())
            first_token_s.append(healthy_s + client.first_token_s())
            if number == START_ROUNDS:
                context.progress("startup: one more replica")
                yield added_replica(client, application, server.process, target=TARGET)
    against = "the same shape without weights"
    yield _figure("serve run to first token", first_token_s, against, weightless_s, TARGET)


def _figure(
    what: str, value: Iterable[float], against: str, reference: Iterable[float], target: float | None = None
) -> Figure:
    sides = Samples(tuple(value)), Samples(tuple(reference))
    return compared("startup", "demo", what, sides[0], against, sides[1], unit="s", target=target)


def _imports() -> Figure:
    """Wall time of fresh interpreters; what they import has been read from disk before."""
    sides = {name: partial(_import_s, modules) for name, modules in (("ours", EXPERT_IMPORTS), ("bare", BARE_IMPORTS))}
    taken = alternate(sides, rounds=IMPORT_ROUNDS)
    return _figure("imports of an expert replica", taken["ours"].values, " + ".join(BARE_IMPORTS), taken["bare"].values)


def _import_s(modules: tuple[str, ...]) -> float:
    started = time.monotonic()
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    subprocess.run(command, cwd=project_root(), check=True, timeout=IMPORT_S)
    return time.monotonic() - started


class _Server:
    """`serve run` in a process of its own, and everything it starts."""

    def __init__(self, config: Path, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("serve")), "run", str(config)],
                cwd=project_root(),
                env={**environment, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_health(self) -> None:
        """Return as soon as `/health` is 200."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=ANSWER_S):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)
        tail = self._log.read_text()[-LOG_TAIL_CHARS:]
        raise RuntimeError(f"not healthy (exit status {self._process.poll()}):\n{tail}")

    @property
    def process(self) -> psutil.Process:
        """`serve run` itself; everything else descends from it."""
        return psutil.Process(self._process.pid)

    def stop(self) -> None:
        """Ctrl-C; what Ray leaves behind is asked to end, and then killed."""
        if self._process.poll() is not None:
            return
        started = self.process.children(recursive=True)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        left = [process for process in started if process.is_running()]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                try:
                    end(process)
                except psutil.NoSuchProcess:
                    continue
            _, left = psutil.wait_procs(left, timeout=LEFT_S)


@contextmanager
def _served(context: Context, application: Mapping[str, Any]) -> Iterator[tuple[_Server, float]]:
    """Runs the application until the block ends; yields it, and the seconds until it was healthy."""
    port, name = free_port(), application["name"]
    config = context.scratch / f"startup-{name}.json"  # JSON is YAML
    http_options = {"host": "127.0.0.1", "port": port}
    config.write_text(json.dumps({"http_options": http_options, "applications": [application]}))
    started = time.monotonic()
    server = _Server(config, port, config.with_suffix(".log"))
    try:
        server.await_health()
        yield server, time.monotonic() - started
    finally:
        server.stop()

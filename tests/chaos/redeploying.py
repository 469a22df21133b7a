"""A server that a test redeploys: its config as a document, `serve deploy` of another one, clients that never stop."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra.bench.serve_rest import ServeRest
from tests.chaos.processes import Processes
from tests.chaos.streams import Asked, Told, ask
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

DEMO = ROOT / "deployments" / "configs" / "demo.yaml"
DEPLOY_S = 60.0
ROLLED_OUT_S = 150.0

Change = Callable[[dict[str, Any]], None]


class Redeployable:
    """`server` is running what `document` says; `application` is its one application."""

    def __init__(self, server: Server, document: dict[str, Any], folder: Path) -> None:
        self.server = server
        self.document = document
        self._folder = folder

    @property
    def application(self) -> dict[str, Any]:
        """Serve's part of the config."""
        found: dict[str, Any] = self.document["applications"][0]
        return found

    @cached_property
    def rest(self) -> ServeRest:
        """Serve's REST API."""
        return ServeRest(psutil.Process(self.server.process.pid))

    @cached_property
    def processes(self) -> Processes:
        """Who runs what."""
        return Processes(psutil.Process(self.server.process.pid), self.application["name"])

    def cluster(self) -> dict[str, Any]:
        """The body of `/v1/cluster`."""
        shown: dict[str, Any] = self.server.get("/v1/cluster")
        return shown

    def pids(self) -> dict[str, set[int]]:
        """Deployment -> processes of its replicas."""
        return {name: set(pids) for name, pids in self.processes.kinds().items()}

    def deploy(self, change: Change) -> None:
        """`serve deploy` of the changed config, from another shell."""
        change(self.application)
        file = self._folder / "changed.yaml"
        file.write_text(yaml.safe_dump(self.document))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "--address", self.rest.dashboard_url]
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEPLOY_S, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def wait_for_successors(self, before: dict[str, set[int]], timeout_s: float = ROLLED_OUT_S) -> None:
        """Until every deployment of `before` has a running replica that was not there."""

        def succeeded() -> bool:
            states = self.rest.replica_states(self.application["name"])
            now = self.pids()
            return all(
                now.get(name, set()) - known and "STARTING" not in states[name] for name, known in before.items()
            )

        wait_for(succeeded, timeout_s, "successors of all replicas")

    def wait_for_departure(self, before: dict[str, set[int]], timeout_s: float) -> float:
        """Until none of the processes `before` is left; the seconds that took."""
        started = time.monotonic()
        gone = set().union(*before.values())
        wait_for(lambda: not gone & set().union(*self.pids().values()), timeout_s, f"{before} gone")
        return time.monotonic() - started


@contextmanager
def redeployable(folder: Path, change: Change) -> Iterator[Redeployable]:
    """The demo, changed, running."""
    document = yaml.safe_load(DEMO.read_text())
    change(document["applications"][0])
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    port = free_port()
    with serving(launch(config, port), port, folder / "log") as server:
        # The HTTP options of the running server, or `serve deploy` would complain of their absence.
        document["http_options"] = {"host": "127.0.0.1", "port": port}
        yield Redeployable(server, copy.deepcopy(document), folder)


class Newcomers:
    """Clients that ask one short question after another; every answer must be one of `wanted`."""

    def __init__(self, port: int, asked: Sequence[Asked], wanted: Callable[[Asked], set[str]]) -> None:
        self._port = port
        self._asked = asked
        self._wanted = wanted
        self.answers: list[tuple[float, Asked, str]] = []
        self.failures: list[str] = []
        self.longest_s = 0.0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """One client for each question until the block ends."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._ask_on, args=(each, stop), daemon=True) for each in self._asked]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask_on(self, asked: Asked, stop: threading.Event) -> None:
        while not stop.is_set():
            since = time.monotonic()
            told = ask(self._port, asked, Told())
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - since)
            if not told.whole or told.text not in self._wanted(asked):
                self.failures.append(f"{asked.prompt[:20]!r}: {told.error or told.finish} {told.text!r}")
                time.sleep(0.2)
            else:
                self.answers.append((now, asked, told.text))

"""How soon things start: the whole application, and one more expert replica, each against the same without weights.

The whole: `serve run` of the demo to the first token, against an application of the same shape that loads nothing
(`weightless_app`), to the first answer of its router. One more replica: see `added_replica`, on the same running demo.
Also what a replica's imports take, which are most of its start. Both sides run by bare `serve run` in the environment
that `make serve` gives it. The first start of a run, which finds libraries on disk and not in memory, does not count
(it is one of `serving`, where that has run before); then the demo comes before and after each start of the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import project_root
from deployments.launch import serve_environment
from infra.bench import models
from infra.bench.added_replica import Client, added_replica
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate
from infra.bench.server import Server, free_port, running

WEIGHTLESS = {"name": "weightless", "route_prefix": "/", "import_path": "infra.bench.weightless_app:build"}
TARGET = 1.3
START_ROUNDS, IMPORT_ROUNDS = 1, 2
IMPORT_S = 60.0

EXPERT_IMPORTS = (
    "deployments.experts.deployment",
    "deployments.experts.replica",
    "cluster.fabric.ray_references",
    "cluster.fabric.store_codec",
)
"""What a replica of experts-N imports, at once and in its constructor."""
BARE_IMPORTS = ("ray.serve", "torch")


def run(context: Context) -> Iterable[Figure]:
    """Over two minutes; nothing in a smoke run, as all of it needs Ray."""
    if context.smoke:
        return
    application = models.demo().application
    if not context.has_served:
        context.progress("startup: an application without weights, as a warm-up")
        with _served(context, WEIGHTLESS):
            pass
    weightless_s, first_token_s = [], []
    for _ in range(START_ROUNDS):
        context.progress("startup: the demo")
        with _served(context, application) as (server, healthy_s):
            first_token_s.append(healthy_s + Client(server.url, models.demo()).first_token_s())
        context.progress("startup: the application without weights")
        with _served(context, WEIGHTLESS) as (_, healthy_s):
            weightless_s.append(healthy_s)
    # The last of the demo's starts is the server that gets one more replica.
    context.progress("startup: the demo, and one more replica")
    with _served(context, application) as (server, healthy_s):
        client = Client(server.url, models.demo())
        first_token_s.append(healthy_s + client.first_token_s())
        against = "the same shape without weights"
        yield _figure("serve run to first token", first_token_s, against, weightless_s, TARGET)
        yield added_replica(client, application, server.process, target=TARGET)
    context.progress("startup: imports")
    yield _imports()


def _figure(
    what: str, value: Iterable[float], against: str, reference: Iterable[float], target: float | None = None
) -> Figure:
    sides = Samples(tuple(value)), Samples(tuple(reference))
    return compared("startup", "demo", what, sides[0], against, sides[1], unit="s", target=target)


def _imports() -> Figure:
    """Wall time of fresh interpreters; what they import has been read from disk by the starts before."""
    sides = {name: partial(_import_s, modules) for name, modules in (("ours", EXPERT_IMPORTS), ("bare", BARE_IMPORTS))}
    taken = alternate(sides, rounds=IMPORT_ROUNDS, warm_up=0)
    return _figure("imports of an expert replica", taken["ours"].values, " + ".join(BARE_IMPORTS), taken["bare"].values)


def _import_s(modules: tuple[str, ...]) -> float:
    started = time.monotonic()
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    subprocess.run(command, cwd=project_root(), check=True, timeout=IMPORT_S)
    return time.monotonic() - started


@contextmanager
def _served(context: Context, application: Mapping[str, Any]) -> Iterator[tuple[Server, float]]:
    """Runs the application until the block ends; yields it, and the seconds until it was healthy."""
    port, name = free_port(), application["name"]
    config = context.scratch / f"startup-{name}.json"  # JSON is YAML
    http_options = {"host": "127.0.0.1", "port": port}
    config.write_text(json.dumps({"http_options": http_options, "applications": [application]}))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
    # As `make serve` runs it; what is set already goes before that there too.
    environment = {name: value for name, value in serve_environment().items() if name not in os.environ}
    started = time.monotonic()
    with running(command, port, config.with_suffix(".log"), environment, may_leave_processes=True) as server:
        server.await_health()
        yield server, time.monotonic() - started

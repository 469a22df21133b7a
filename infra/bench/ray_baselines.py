"""What one would write first: a group's rows as the argument of an actor call, or of a call through a Serve handle.

Arrays by value, default settings, one actor or one deployment a group, all groups asked before the first is awaited.
Also the Ray cluster that sides of the benchmark start for themselves. Knows nothing of the project's own fabric.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import psutil
import ray
from ray import serve

Rows = Mapping[int, npt.NDArray[Any]]
"""Group -> its rows [R, H]."""
Exchange = Callable[[Rows], list[npt.NDArray[Any]]]
"""Sends every group its rows and returns what they answer."""
WAIT_S = 60.0
STOP_S = 15.0
_CPUS_EACH = 0.1


@contextmanager
def ray_cluster(*, store_bytes: int) -> Iterator[None]:
    """A cluster of this machine's own, with an object store of `store_bytes`; at the end none of its processes runs."""
    before = set(psutil.Process().children(recursive=True))
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=store_bytes,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        started = set(psutil.Process().children(recursive=True)) - before
        ray.shutdown()
        # They end by themselves within seconds; what is measured next is to have the machine for itself.
        _, left = psutil.wait_procs(started, timeout=STOP_S)
        for process in left:
            process.kill()


class Experts:
    """A group without experts."""

    async def compute(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows."""
        return rows


class SynchronousExperts:
    """The same for an actor, which is faster without an event loop."""

    def compute(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows."""
        return rows


def actor_calls(groups: int) -> Exchange:
    """An exchange by plain actor calls. The actors end with the cluster."""
    actors = [ray.remote(num_cpus=_CPUS_EACH)(SynchronousExperts).remote() for _ in range(groups)]

    def exchange(rows: Rows) -> list[npt.NDArray[Any]]:
        answers = [actors[group].compute.remote(part) for group, part in rows.items()]
        return list(ray.get(answers, timeout=WAIT_S))

    return exchange


@contextmanager
def serve_handles(groups: int) -> Iterator[Exchange]:
    """An exchange by Serve handles, without an HTTP proxy beside it."""
    # Progress of the benchmark is shown on the same terminal.
    log = logging.getLogger("ray.serve")
    level = log.level
    log.setLevel(logging.ERROR)
    served = serve.deployment(ray_actor_options={"num_cpus": _CPUS_EACH})(Experts)
    try:
        serve.start(proxy_location="Disabled")
        targets = [serve.RunTarget(served.bind(), name=f"experts-{i}", route_prefix=None) for i in range(groups)]
        handles = serve.run_many(targets)

        def exchange(rows: Rows) -> list[npt.NDArray[Any]]:
            answers = [handles[group].compute.remote(part) for group, part in rows.items()]
            return [answer.result(timeout_s=WAIT_S) for answer in answers]

        yield exchange
    finally:
        serve.shutdown()
        log.setLevel(level)

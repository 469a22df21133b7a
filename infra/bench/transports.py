"""Object store against stream by the size of a layer's hidden states, and whether `auto` takes the better of the two.

4 groups in 4 Ray actors, experts excluded (`expert_processes.EchoGroup`), H = 2048, float32, whole scatter + gather by
one `Dispatcher` per transport. The store holds hidden states once for all groups, a stream carries a copy of every row:
so the more experts a token has, the sooner the store pays. `auto` decides with the config's default threshold.
Not part of a smoke run, as it needs Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import pairwise

import torch

from cluster.config import ExpertsSpec
from cluster.fabric.auto import AutoTransport
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.membership import Replica, View
from infra.bench.context import Context
from infra.bench.expert_processes import GROUPS, EchoGroup, new_dispatcher, new_stream, view_of
from infra.bench.fabric import LayerInput, layer_input, mean_us
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate

LAYER = 1
TOKENS = {2: (8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384), 6: (32, 128, 512, 1024, 2048)}
"""T by K: 64 KiB to 128 MiB of hidden states, so that top-2 lies on both sides of the default threshold."""
AUTO_TARGET = 1.1
ROUNDS, SAMPLE_S = 5, 0.1
LARGE_BYTES, LARGE_ROUNDS = 33 << 20, 3
"""From so many on a call takes most of a second."""
SETTLE_S = 0.05
"""Before a sample: Ray goes on freeing objects after the side before it, which must not be charged to this one."""
STORE_BYTES = 2 << 30
WAIT_S = 60.0


def run(context: Context) -> Iterable[Figure]:
    """Every size, then where the curves cross."""
    if context.smoke:
        context.progress("transports: left out of a smoke run, as it needs Ray")
        return []
    # Imported here: it takes seconds, and a smoke run does without.
    from infra.bench.ray_baselines import ray_cluster

    figures: list[Figure] = []
    with torch.inference_mode(), ray_cluster(store_bytes=STORE_BYTES), _replicas() as view, _dispatchers(view) as ways:
        for per_token, sizes in TOKENS.items():
            points = []
            for tokens in sizes:
                given = layer_input(tokens, LAYER, per_token)
                case = f"top-{per_token} {given.hidden.nbytes >> 10} KiB"
                context.progress(f"transports: {case}")
                taken = _measure(given, ways)
                figures += _figures(case, taken)
                points.append((given.hidden.nbytes, taken["object store"].median / taken["stream"].median))
            figures.append(_crossover_figure(per_token, points))
    return figures


def crossover_bytes(points: Sequence[tuple[int, float]]) -> float | None:
    """Where the store becomes the faster one for good; None where it never does, or always is.

    points: (bytes, time of the store / time of the stream) by rising bytes; between two, both scales are logarithmic.
    (1 MiB, 2.0), (4 MiB, 0.5) -> 2 MiB.
    """
    for (below, slower), (above, faster) in reversed(list(pairwise(points))):
        if faster > 1:
            return None
        if slower > 1:
            share = math.log(slower) / (math.log(slower) - math.log(faster))
            return float(below * (above / below) ** share)
    return None


def _measure(given: LayerInput, ways: dict[str, Dispatcher]) -> dict[str, Samples]:
    sides: dict[str, Callable[[], float]] = {}
    expected = ways["stream"].scatter_gather(given.layer, given.hidden, given.index, given.weight).clone()
    for name, dispatcher in ways.items():
        call = partial(dispatcher.scatter_gather, given.layer, given.hidden, given.index, given.weight)
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)
        begun_s = time.perf_counter()
        call()
        took_s = time.perf_counter() - begun_s
        sides[name] = partial(_settled_us, call, max(1, min(100, round(SAMPLE_S / took_s))))
    if given.hidden.nbytes >= LARGE_BYTES:
        return alternate(sides, rounds=LARGE_ROUNDS, warm_up=0)  # the two calls above have warmed them up
    return alternate(sides, rounds=ROUNDS)


def _settled_us(call: Callable[[], object], calls: int) -> float:
    time.sleep(SETTLE_S)
    return mean_us(call, calls)


def _figures(case: str, taken: dict[str, Samples]) -> list[Figure]:
    better = min(("stream", "object store"), key=lambda name: taken[name].median)
    return [
        compared("transports", case, "object store", taken["object store"], "stream", taken["stream"], unit="us"),
        compared("transports", case, "auto", taken["auto"], better, taken[better], unit="us", target=AUTO_TARGET),
    ]


def _crossover_figure(per_token: int, points: Sequence[tuple[int, float]]) -> Figure:
    """Beside the configured threshold; the end of the sizes where the crossover lies beyond it."""
    crossover = crossover_bytes(points)
    what = "crossover, hidden states"
    if crossover is None:
        last_bytes, last_ratio = points[-1]
        crossover, what = (last_bytes, "crossover above") if last_ratio > 1 else (points[0][0], "crossover below")
    threshold = ExpertsSpec().auto_threshold_bytes
    return Figure(
        "transports", f"top-{per_token}", what, crossover / 1024, "KiB", "configured threshold", threshold / 1024
    )


class StoreReplica:
    """What runs in an actor: one group whose rows may come by the object store."""

    def __init__(self, group: int) -> None:
        from cluster.fabric.ray_references import RayReferences
        from cluster.fabric.store_codec import StoreCodec

        self._served = EchoGroup(group, references=StoreCodec(RayReferences()))

    def replica(self) -> Replica:
        """What the directory would be told."""
        return self._served.replica

    def close(self) -> None:
        """Stop serving."""
        self._served.close()


@contextmanager
def _replicas() -> Iterator[View]:
    """One actor a group."""
    import ray

    actors = [ray.remote(num_cpus=0)(StoreReplica).remote(group) for group in range(GROUPS)]
    try:
        yield view_of(ray.get([actor.replica.remote() for actor in actors], timeout=WAIT_S))
    finally:
        ray.get([actor.close.remote() for actor in actors], timeout=WAIT_S)


@contextmanager
def _dispatchers(view: View) -> Iterator[dict[str, Dispatcher]]:
    """By name of transport, each with connections of its own."""
    from cluster.fabric.ray_references import RayReferences

    with ExitStack() as stack:
        stream, under_store, under_auto = (stack.enter_context(closing(new_stream())) for _ in range(3))
        store = stack.enter_context(closing(ObjectStoreTransport(under_store, RayReferences())))
        part = ObjectStoreTransport(under_auto, RayReferences())
        auto = stack.enter_context(
            closing(AutoTransport(under_auto, part, threshold_bytes=ExpertsSpec().auto_threshold_bytes))
        )
        yield {
            name: new_dispatcher(transport, view)
            for name, transport in (("stream", stream), ("object store", store), ("auto", auto))
        }

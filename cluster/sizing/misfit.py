"""What to say where a model does not fit: how much is missing, and what would do. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.sizing.gpus import GB, GpuPool
from cluster.sizing.memory import Work, router_memory, tokens_that_fit
from cluster.sizing.shape import Shape


def gigabytes(size: float) -> str:
    """`12.3 GB`, of 10^9 bytes each."""
    return f"{size / GB:,.1f} GB"


def router_misfit(shape: Shape, pools: Sequence[GpuPool], work: Work, reserve: float) -> str:
    """No kind of GPU holds a router, or there are too few of the kinds that do."""
    router = router_memory(shape, work)
    need = router.total_bytes
    able = [pool for pool in pools if pool.memory_bytes * (1 - reserve) >= need]
    if able:
        counts = ", ".join(f"{pool.count} {pool.name}" for pool in able)
        return f"--gpus: {work.routers} routers need a GPU each of {gigabytes(need)}, but there are only {counts}."
    largest = max(pools, key=lambda pool: pool.memory_bytes)
    room = largest.memory_bytes * (1 - reserve)
    parts = f"{gigabytes(router.weights_bytes)} of weights, {gigabytes(router.kv_bytes)} of keys and values, "
    parts += f"{gigabytes(router.step_bytes)} for a step"
    sentence = (
        f"--gpus: a router needs {gigabytes(need)} ({parts}), but {largest.name} gives {gigabytes(room)}: "
        f"{gigabytes(need - room)} are missing; what would fit: a GPU of {gigabytes(need / (1 - reserve))}"
    )
    fewer = tokens_that_fit(shape, work, room)
    return f"{sentence}, or --kv-tokens {fewer}." if fewer else f"{sentence}."


def experts_misfit(shape: Shape, left: Sequence[GpuPool], places: Sequence[int], reserve: float, whole: int = 1) -> str:
    """The experts do not fit beside the routers.

    left: GPUs that are no router's; places: experts that one holds, a multiple of `whole`, which is 1, or with loads
    the layers: the planner holds as many experts of the model's largest layer in every layer.
    """
    wanted = shape.places if whole == 1 else whole * max(shape.experts.values())
    held = sum(pool.count * each for pool, each in zip(left, places, strict=True))
    needed, room = (count * shape.expert_bytes for count in (wanted, held))
    rest = ", ".join(f"{pool.count} {pool.name}" for pool in left if pool.count) or "no GPU is left"
    more = [
        f"{math.ceil((wanted - held) / each)} more {pool.name}"
        for pool, each in zip(left, places, strict=True)
        if each > 0
    ]
    least = whole * shape.expert_bytes / (1 - reserve)
    one = "one expert of one layer takes" if whole == 1 else "one expert of every layer takes"
    fits = " or ".join(more) or f"GPUs of more than {gigabytes(least)}, as {one} as much"
    planner = "" if whole == 1 else "; --loads needs GPUs that hold an expert of every layer"
    return (
        f"--gpus: the experts need {gigabytes(needed)}, but beside the routers is room for {gigabytes(room)} ({rest}): "
        f"{gigabytes(needed - room)} are missing; what would fit: {fits}{planner}."
    )

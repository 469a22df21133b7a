"""Partitions made from expert loads alone: groups of equal load, or the hottest experts of every layer together.

Pure. What a budget of devices makes of the loads is decided in `planner`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from cluster.errors import PlacementError
from cluster.placement.partition import Experts, Placement, check_group_count


def balanced(experts_per_layer: Mapping[int, int], groups: int, load: Mapping[int, Sequence[float]]) -> Placement:
    """Give every group about the same load in every layer, with as equal numbers of experts as possible.

    Longest-processing-time-first with a cap on experts per group (Graham 1969; the packing step of DeepSeek's EPLB):
    heaviest expert first, each to the lightest group that still has room. `load[layer][expert]` is in any unit.

    Raises:
        PlacementError: a layer or an expert has no load, or a load is negative or not finite.
    """
    check_group_count(experts_per_layer, groups)
    chosen: tuple[Experts, ...] = tuple({} for _ in range(groups))
    for layer, count in experts_per_layer.items():
        for index, ids in enumerate(_pack(checked_load(load, layer, count), groups)):
            chosen[index][layer] = ids
    return Placement(dict(experts_per_layer), chosen)


def hot_aligned(experts_per_layer: Mapping[int, int], groups: int, load: Mapping[int, Sequence[float]]) -> Placement:
    """The hottest experts of every layer in group 0, the next hottest in group 1, and so on to the coldest.

    What heats one group then heats it in all layers, so that one more replica of group 0 shortens every layer of a
    step, and the last groups never need a second one. Numbers of experts differ by at most one; the hotter groups are
    the smaller: 6 experts in 4 groups are dealt 1, 1, 2, 2. `load[layer][expert]` is in any unit; ties go by id.

    Raises:
        PlacementError: a layer or an expert has no load, or a load is negative or not finite.
    """
    check_group_count(experts_per_layer, groups)
    chosen: tuple[Experts, ...] = tuple({} for _ in range(groups))
    for layer, count in experts_per_layer.items():
        weights = checked_load(load, layer, count)
        hottest_first = sorted(range(count), key=lambda expert: (-weights[expert], expert))
        full, larger = divmod(count, groups)
        start = 0
        for index in range(groups):
            end = start + full + (index >= groups - larger)
            chosen[index][layer] = tuple(sorted(hottest_first[start:end]))
            start = end
    return Placement(dict(experts_per_layer), chosen)


def checked_load(load: Mapping[int, Sequence[float]], layer: int, count: int) -> Sequence[float]:
    """The loads of the `count` experts of `layer`.

    Raises:
        PlacementError: they are missing, another number, negative or not finite.
    """
    weights = load.get(layer)
    if weights is None or len(weights) != count or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise PlacementError(f"the load file must give {count} finite loads of at least 0 for layer {layer}.")
    return weights


def _pack(weights: Sequence[float], groups: int) -> list[tuple[int, ...]]:
    """Split range(len(weights)) into `groups` sorted tuples of balanced weight and near-equal length."""
    full, larger = divmod(len(weights), groups)
    members: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0.0, index) for index in range(groups)]
    for expert in sorted(range(len(weights)), key=lambda e: (-weights[e], e)):
        while True:
            total, index = heapq.heappop(heap)
            if len(members[index]) < full:
                break
            if larger > 0 and len(members[index]) == full:
                larger -= 1
                break
        members[index].append(expert)
        heapq.heappush(heap, (total + weights[expert], index))
    return [tuple(sorted(ids)) for ids in members]

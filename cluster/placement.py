"""Which group holds which expert: pure functions from expert counts and loads to a `Placement`.

Knows no Ray, no checkpoint format, no clock. A group may hold different experts in different layers.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import PlacementError

Experts = dict[int, tuple[int, ...]]
"""Layer -> expert ids in ascending order."""


@dataclass(frozen=True)
class Placement:
    """A partition of all experts: `groups[g][layer]` are the sorted expert ids that group g holds in that layer.

    Invariant: every (layer, expert) of `experts_per_layer` is in exactly one group, no group is empty, and a layer in
    which a group holds nothing is left out of it.
    """

    experts_per_layer: Mapping[int, int]
    groups: tuple[Experts, ...]

    def __post_init__(self) -> None:
        _check_partition(self.experts_per_layer, self.groups)
        for index, group in enumerate(self.groups):
            if any(not ids or list(ids) != sorted(ids) for ids in group.values()):
                raise PlacementError(f"group experts-{index}: the experts of a layer must be named in ascending order.")

    @cached_property
    def owner(self) -> dict[int, tuple[int, ...]]:
        """Layer -> group index of each expert, in order of expert id."""
        owners: dict[int, tuple[int, ...]] = {}
        for layer, count in self.experts_per_layer.items():
            row = [0] * count
            for index, group in enumerate(self.groups):
                for expert in group.get(layer, ()):
                    row[expert] = index
            owners[layer] = tuple(row)
        return owners

    def as_json(self) -> str:
        """Canonical text of the placement, the same for equal placements; part of the model digest."""
        groups = [{str(layer): list(ids) for layer, ids in sorted(group.items())} for group in self.groups]
        return json.dumps(groups, separators=(",", ":"), sort_keys=True)


def contiguous(experts_per_layer: Mapping[int, int], groups: int) -> Placement:
    """Cut every layer's experts into `groups` runs of neighbouring ids whose lengths differ by at most one.

    6 experts in 4 groups: [0] [1 2] [3] [4 5].
    """
    _check_group_count(experts_per_layer, groups)
    return Placement(
        dict(experts_per_layer),
        tuple(
            {
                layer: tuple(range(count * index // groups, count * (index + 1) // groups))
                for layer, count in experts_per_layer.items()
            }
            for index in range(groups)
        ),
    )


def balanced(experts_per_layer: Mapping[int, int], groups: int, load: Mapping[int, Sequence[float]]) -> Placement:
    """Give every group about the same load in every layer, with as equal numbers of experts as possible.

    Longest-processing-time-first with a cap on experts per group (Graham 1969; the packing step of DeepSeek's EPLB):
    heaviest expert first, each to the lightest group that still has room. `load[layer][expert]` is in any unit.

    Raises:
        PlacementError: a layer or an expert has no load, or a load is negative or not finite.
    """
    _check_group_count(experts_per_layer, groups)
    chosen: tuple[Experts, ...] = tuple({} for _ in range(groups))
    for layer, count in experts_per_layer.items():
        weights = load.get(layer)
        if (
            weights is None
            or len(weights) != count
            or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
        ):
            raise PlacementError(f"the load file must give {count} finite loads of at least 0 for layer {layer}.")
        for index, ids in enumerate(_pack(weights, groups)):
            chosen[index][layer] = ids
    return Placement(dict(experts_per_layer), chosen)


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


def explicit(experts_per_layer: Mapping[int, int], groups: Sequence[Mapping[int, Sequence[int]]]) -> Placement:
    """The placement as written, checked to be a partition.

    Raises:
        PlacementError: an expert is in two groups or in none, or does not exist.
    """
    return Placement(
        dict(experts_per_layer),
        tuple({layer: tuple(sorted(ids)) for layer, ids in group.items() if ids} for group in groups),
    )


def read_load(path: Path) -> dict[int, list[float]]:
    """Read a load file: `{"layers": [1, 2], "domains": {name: [[load per expert] per layer]}}`, summed."""
    data = _read(path)
    try:
        layers = [_whole(layer) for layer in data["layers"]]
        per_domain = [[[float(x) for x in row] for row in rows] for rows in data["domains"].values()]
        return {
            layer: [sum(column) for column in zip(*(rows[i] for rows in per_domain), strict=True)]
            for i, layer in enumerate(layers)
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise PlacementError(f"the load file {path} must hold `layers` and `domains` with a load per expert.") from None


def read_groups(path: Path) -> list[dict[int, list[int]]]:
    """Read a placement file: `groups: [{layer: [expert ids]}, ...]`."""
    data = _read(path)
    try:
        return [
            {_whole(layer): [_whole(expert) for expert in ids] for layer, ids in group.items()}
            for group in data["groups"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PlacementError(
            f"the placement file {path} must hold `groups`, a list of {{layer: [expert ids]}}."
        ) from None


def _whole(value: object) -> int:
    """`value` where it is a whole number; JSON has strings for keys, so digits count as one."""
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _read(path: Path) -> Any:
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        # PyYAML reads JSON too, but takes seconds for the load file of a large model.
        return json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise PlacementError(f"the file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise PlacementError(f"the file {path} is not valid {kind}.") from None


def _check_group_count(experts_per_layer: Mapping[int, int], groups: int) -> None:
    fewest = min(experts_per_layer.values(), default=0)
    if not 1 <= groups <= fewest:
        raise PlacementError(
            f"experts.groups: {groups} groups, but a layer has {fewest} experts; allowed: 1 to {fewest}."
        )


def _check_partition(experts_per_layer: Mapping[int, int], groups: Sequence[Experts]) -> None:
    seen: dict[tuple[int, int], int] = {}
    for index, group in enumerate(groups):
        if not any(group.values()):
            raise PlacementError(f"group experts-{index} holds no expert; every group needs at least one.")
        for layer, ids in group.items():
            if layer not in experts_per_layer:
                known = ", ".join(map(str, sorted(experts_per_layer)))
                raise PlacementError(f"group experts-{index} names layer {layer}; layers with experts: {known}.")
            for expert in ids:
                if not 0 <= expert < experts_per_layer[layer]:
                    last = experts_per_layer[layer] - 1
                    raise PlacementError(
                        f"group experts-{index} names expert {expert} of layer {layer}; allowed: 0 to {last}."
                    )
                if (layer, expert) in seen:
                    first = seen[layer, expert]
                    where = f"experts-{first} and experts-{index}" if first != index else f"experts-{index} twice"
                    raise PlacementError(
                        f"expert {expert} of layer {layer} is in {where}; each expert belongs to exactly one group."
                    )
                seen[layer, expert] = index
    for layer, count in experts_per_layer.items():
        for expert in range(count):
            if (layer, expert) not in seen:
                raise PlacementError(
                    f"expert {expert} of layer {layer} is in no group; each expert belongs to exactly one group."
                )

"""The partition of a model's experts into groups, and the two that need no loads.

Pure; knows no Ray, no checkpoint format, no clock. A group may hold different experts in different layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

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
            if any(not ids or ids != (*sorted(ids),) for ids in group.values()):
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
    check_group_count(experts_per_layer, groups)
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


def explicit(experts_per_layer: Mapping[int, int], groups: Sequence[Mapping[int, Sequence[int]]]) -> Placement:
    """The placement as written, checked to be a partition.

    Raises:
        PlacementError: an expert is in two groups or in none, or does not exist.
    """
    return Placement(
        dict(experts_per_layer),
        tuple({layer: tuple(sorted(ids)) for layer, ids in group.items() if ids} for group in groups),
    )


def check_group_count(experts_per_layer: Mapping[int, int], groups: int) -> None:
    """Every group can hold an expert of every layer.

    Raises:
        PlacementError: there are more groups than experts in some layer, or none.
    """
    fewest = min(experts_per_layer.values(), default=0)
    if not 1 <= groups <= fewest:
        raise PlacementError(
            f"experts.groups: {groups} groups, but a layer has {fewest} experts; allowed: 1 to {fewest}."
        )


def _check_partition(experts_per_layer: Mapping[int, int], groups: Sequence[Experts]) -> None:
    # Explaining what is wrong costs a look at every expert, so it is done only where the sums say that something is.
    known = all(group.keys() <= experts_per_layer.keys() and any(group.values()) for group in groups)
    if known and all(
        sorted(chain.from_iterable(group.get(layer, ()) for group in groups)) == list(range(count))
        for layer, count in experts_per_layer.items()
    ):
        return
    _explain(experts_per_layer, groups)


def _explain(experts_per_layer: Mapping[int, int], groups: Sequence[Experts]) -> None:
    """Raise what is wrong first."""
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

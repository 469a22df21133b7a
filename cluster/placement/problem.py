"""Loads and devices as arrays, and the bounds that no placement on given devices can beat.

Dimension letters: L layers, E experts of the largest layer, K kinds of devices, G groups, C allotments at once. An
*allotment* is how many devices of each kind each group gets: whole numbers [G, K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.errors import PlacementError
from cluster.placement.devices import DeviceKind

_HOTTEST = 64
"""Experts of a layer that `_whole_experts` looks at; colder ones hardly ever bind."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a plan is made from.

    layers: ids, in ascending order. experts [L]: how many each has. weights [L, E]: load of each expert; 0 beyond a
    layer's own experts. kinds: K kinds of devices, and count, slots and speeds [K] the same as arrays.
    """

    layers: tuple[int, ...]
    experts: Ints
    weights: Floats
    kinds: tuple[DeviceKind, ...]

    @cached_property
    def available(self) -> Ints:
        """[K] devices of each kind."""
        return np.array([kind.count for kind in self.kinds], dtype=np.int64)

    @cached_property
    def slots(self) -> Ints:
        """[K] experts of one layer that a device of each kind holds; more than a layer has are of no use."""
        return np.minimum(np.array([kind.slots for kind in self.kinds], dtype=np.int64), self.most_experts)

    @cached_property
    def speeds(self) -> Floats:
        """[K] rows a second of a device of each kind."""
        return np.array([kind.speed for kind in self.kinds], dtype=np.float64)

    @cached_property
    def real(self) -> NDArray[np.bool_]:
        """[L, E] whether a layer has that expert."""
        return np.asarray(np.arange(self.most_experts) < self.experts[:, None])

    @property
    def most_experts(self) -> int:
        """E."""
        return int(self.weights.shape[1])

    @cached_property
    def hottest_first(self) -> Ints:
        """[L, E] expert ids of each layer, by falling load; ids that a layer does not have come last."""
        return np.argsort(-self.weights, axis=1, kind="stable")

    @cached_property
    def sorted_weights(self) -> Floats:
        """[L, E] loads of each layer, falling."""
        return np.take_along_axis(self.weights, self.hottest_first, axis=1)

    @cached_property
    def hottest_sum(self) -> Floats:
        """[L, E + 1] load of the n hottest experts of each layer."""
        sums = np.zeros((len(self.layers), self.most_experts + 1))
        np.cumsum(self.sorted_weights, axis=1, out=sums[:, 1:])
        return sums

    def speed_of(self, allotment: Ints) -> Floats:
        """[..., G] speed of all devices of each group together."""
        return allotment @ self.speeds

    def capacity_of(self, allotment: Ints) -> Ints:
        """[..., G] experts of one layer each group holds: as many as its smallest device; 0 without a device."""
        held = np.where(allotment > 0, self.slots, np.iinfo(np.int64).max).min(axis=-1)
        return np.where(allotment.any(axis=-1), held, 0)


@dataclass(frozen=True, eq=False)
class Today:
    """owner [L, E]: today's group of each expert; -1 beyond a layer's own. max_moves: changes of it allowed."""

    owner: Ints
    max_moves: int

    def moves(self, owner: Ints) -> Ints:
        """[L] experts of each layer that are in another group than today. owner [L, E]."""
        return np.asarray(((owner != self.owner) & (self.owner >= 0)).sum(axis=1))


def slowest_of(problem: Problem, allotment: Ints, owner: Ints) -> Floats:
    """[L] when the slowest group of each layer finishes. allotment [G, K], owner [L, E]."""
    layers, groups = len(problem.layers), len(allotment)
    at = owner + np.arange(layers)[:, None] * groups
    load = np.bincount(at[problem.real], weights=problem.weights[problem.real], minlength=layers * groups)
    return np.asarray((load.reshape(layers, groups) / problem.speed_of(allotment)).max(axis=1))


def make_problem(load: Mapping[int, Sequence[float]], kinds: Sequence[DeviceKind]) -> Problem:
    """load[layer][expert] in any unit.

    Raises:
        PlacementError: there is no layer, no expert, no device, or a load is negative or not finite.
    """
    layers = tuple(sorted(load))
    experts = np.array([len(load[layer]) for layer in layers], dtype=np.int64)
    if not layers or experts.min() < 1 or not kinds:
        raise PlacementError("a plan needs at least one layer, one expert in every layer, and one device.")
    weights = np.zeros((len(layers), int(experts.max())))
    for index, layer in enumerate(layers):
        weights[index, : experts[index]] = load[layer]
    if not np.isfinite(weights.sum()) or weights.min() < 0:
        raise PlacementError("the load file must give finite loads of at least 0.")
    return Problem(layers, experts, weights, tuple(kinds))


def bounds(problem: Problem, allotments: Ints) -> Floats:
    """[C, L] a time no placement on these devices beats. allotments [C, G, K], with empty groups where there are fewer.

    The n hottest experts are in at most n groups, so some group needs their load over the speed of the n fastest
    (Horvath, Lam and Sethi 1977). And any n groups hold no more than their slots: the rest must go to the others.
    """
    speed, room, groups = _fastest_first(problem, allotments)
    nth = np.minimum(np.arange(1, speed.shape[1] + 1), groups[:, None])
    fastest = np.cumsum(speed, axis=1)
    total = problem.hottest_sum[:, -1]
    most = problem.most_experts
    # [L, C, G]
    hottest = problem.hottest_sum[:, np.minimum(nth, most)] / fastest
    held = problem.hottest_sum[:, np.minimum(np.cumsum(room, axis=1), most)]
    others = fastest[:, -1:] - fastest
    has_others = nth < groups[:, None]
    left = (total[:, None, None] - held) / np.where(has_others, others, np.inf)
    bound = np.maximum(np.maximum(hottest, left).max(axis=2), total[:, None] / fastest[:, -1])
    return np.asarray(np.maximum(bound.T, _whole_experts(problem, speed, room)))


def _fastest_first(problem: Problem, allotments: Ints) -> tuple[Floats, Ints, Ints]:
    """Speed and room [C, G] of the groups, falling in speed, and how many [C] have a device."""
    speed = problem.speed_of(allotments)
    order = np.argsort(-speed, axis=1, kind="stable")
    speed = np.take_along_axis(speed, order, axis=1)
    room = np.take_along_axis(problem.capacity_of(allotments), order, axis=1)
    return speed, room, np.asarray((speed > 0).sum(axis=1))


def _whole_experts(problem: Problem, speed: Floats, room: Ints) -> Floats:
    """[C, L] a bound from experts being whole: the k-th hottest is with a group of speed s or slower, or it and all
    hotter ones share the faster groups: min(w_k / s, sum of k / speed of the faster), for every k and every s."""
    looked_at = min(_HOTTEST, problem.most_experts)
    hot, sums = problem.sorted_weights[:, :looked_at], problem.hottest_sum[:, 1 : looked_at + 1]
    bound = np.zeros((len(speed), len(problem.layers)))
    nth = np.arange(1, looked_at + 1)
    for index in range(len(speed)):
        # Only where the speed falls: within equal groups the first says all.
        starts = np.flatnonzero(np.diff(speed[index], prepend=np.inf) < 0)
        starts = starts[speed[index, starts] > 0]
        faster = np.array([speed[index, :start].sum() for start in starts])
        slots = np.array([room[index, :start].sum() for start in starts])
        room_for_all = nth <= slots[:, None]
        share = np.where(room_for_all, sums[:, None] / np.where(faster > 0, faster, 1.0)[:, None], np.inf)
        each = hot[:, None] / speed[index, starts, None]
        bound[index] = np.minimum(share, each).max(axis=(1, 2))
    return bound


def global_bound(problem: Problem) -> Floats:
    """[L] a time that no placement on any allotment of the devices beats.

    The n hottest experts are in at most n groups. Those hold at most n times the largest device's slots, so that the
    devices outside must have slots for the rest: what is outside has at least the speed of the slowest slots.
    """
    most = problem.most_experts
    each = np.repeat(problem.speeds / problem.slots, problem.available)
    order = np.argsort(each, kind="stable")
    room = np.concatenate([[0], np.cumsum(np.repeat(problem.slots, problem.available)[order])])
    speed = np.concatenate([[0.0], np.cumsum(np.repeat(problem.speeds, problem.available)[order])])
    nth = np.arange(1, min(most, len(each)) + 1)
    outside = np.maximum(most - nth * int(problem.slots.max()), 0)
    fastest = speed[-1] - np.interp(outside, room, speed)
    with np.errstate(divide="ignore", invalid="ignore"):
        hottest = np.where(fastest > 0, problem.hottest_sum[:, nth] / fastest, 0.0)
    return np.asarray(np.maximum(hottest.max(axis=1), problem.hottest_sum[:, -1] / speed[-1]))

"""A plan that owes nothing to an earlier one: the allotment with the best bounds, tried out, then filled."""

from __future__ import annotations

import numpy as np

from cluster.placement.allotments import Allotment, best_allotments, by_speed, padded
from cluster.placement.fill import finish_times, improve, longest_first
from cluster.placement.problem import Floats, Ints, Problem, bounds, global_bound

TRIED = 6
"""Allotments that are filled, in some layers, before one is chosen: a bound says nothing of how well experts pack."""
TRIAL_LAYERS = 8


def free_plan(problem: Problem, groups: int | None) -> tuple[Ints, Ints, float]:
    """Allotment [G, K], the fastest group first, owner [L, E], and a bound on the sum over layers. No group is empty.

    groups: exactly so many; None: as many as are best.

    Raises:
        PlacementError: the experts do not fit.
    """
    candidates, bound = best_allotments(problem, groups, TRIED)
    allotment = by_speed(problem, _tried(problem, candidates))
    owner = aligned(problem, allotment, _filled(problem, allotment))
    if groups is None:
        allotment, owner = without_empty(problem, allotment, owner)
    else:
        owner = nothing_empty(problem, owner, groups)
    return allotment, owner, max(bound, float(global_bound(problem).sum()))


def _tried(problem: Problem, allotments: list[Allotment]) -> Allotment:
    """The one that some layers, packed longest first, finish under soonest. All at once, each a row of the batch."""
    if len(allotments) == 1:
        return allotments[0]
    some = np.unique(np.linspace(0, len(problem.layers) - 1, TRIAL_LAYERS).round().astype(np.int64))
    array = padded(allotments)
    speed = np.where(array.any(axis=2), problem.speed_of(array), 1.0)
    speeds, rooms = (np.repeat(each, len(some), axis=0) for each in (speed, problem.capacity_of(array)))
    weights = np.tile(problem.sorted_weights[some], (len(array), 1))
    times = finish_times(weights, longest_first(weights, speeds, rooms), speeds).max(axis=1)
    return allotments[int(times.reshape(len(array), len(some)).sum(axis=1).argmin())]


def _filled(problem: Problem, allotment: Ints) -> Ints:
    """[L, E] the group of every expert, by id."""
    weights = problem.sorted_weights
    shape = (len(weights), len(allotment))
    speed = np.broadcast_to(problem.speed_of(allotment), shape)
    room = np.broadcast_to(problem.capacity_of(allotment), shape)
    packed = longest_first(weights, speed, room)
    packed = improve(weights, packed, speed, room, bounds(problem, allotment[None])[0])
    owner = np.empty_like(packed)
    np.put_along_axis(owner, problem.hottest_first, packed, axis=1)
    return owner


def aligned(problem: Problem, allotment: Ints, owner: Ints) -> Ints:
    """The same plan with the hottest first among groups of equal devices, in every layer.

    It costs nothing, and what heats a group then heats it in all layers: another replica of it helps in all.
    """
    layers, groups = len(owner), len(allotment)
    load = _load(problem, owner, groups)
    label = np.tile(np.arange(groups), (layers, 1))
    for same in equal_groups(allotment):
        order = np.argsort(-load[:, same], axis=1, kind="stable")
        np.put_along_axis(label, np.asarray(same)[order], np.broadcast_to(same, order.shape), axis=1)
    return unless_emptied(problem, np.take_along_axis(label, owner, axis=1), owner)


def unless_emptied(problem: Problem, owner: Ints, before: Ints) -> Ints:
    """`owner`, or `before` where a group that holds something there would hold nothing in any layer."""
    now, then = (np.count_nonzero(np.bincount(each[problem.real])) for each in (owner, before))
    return owner if now == then else before


def equal_groups(allotment: Ints) -> list[Ints]:
    """The indices of groups with equal devices, for each set of devices that more than one has."""
    _, which = np.unique(allotment, axis=0, return_inverse=True)
    sets = (np.flatnonzero(which == index) for index in range(which.max() + 1))
    return [same for same in sets if len(same) > 1]


def without_empty(problem: Problem, allotment: Ints, owner: Ints) -> tuple[Ints, Ints]:
    """Without the groups that hold nothing; their devices stay unused."""
    held = np.bincount(owner[problem.real], minlength=len(allotment)) > 0
    return allotment[held], (np.cumsum(held) - 1)[owner]


def nothing_empty(problem: Problem, owner: Ints, groups: int) -> Ints:
    """With the coldest expert that can be spared in each group that holds nothing."""
    owner = owner.copy()
    held = np.bincount(owner[problem.real], minlength=groups)
    for group in np.flatnonzero(held == 0):
        spared = problem.real & (held[owner] > 1)
        index = np.unravel_index(np.where(spared, problem.weights, np.inf).argmin(), owner.shape)
        held[owner[index]] -= 1
        owner[index], held[group] = group, 1
    return owner


def _load(problem: Problem, owner: Ints, groups: int) -> Floats:
    at = owner + np.arange(len(owner))[:, None] * groups
    load = np.bincount(at.ravel(), weights=problem.weights.ravel(), minlength=len(owner) * groups)
    return np.asarray(load.reshape(len(owner), groups))

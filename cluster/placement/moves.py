"""Plans that move few experts from today's placement: where to spend a budget of moves.

A move is a (layer, expert) whose group has another index than today; which devices serve a group is no move. First the
devices are dealt for the groups as they are, then each layer improves by swaps and remembers every stage with its
moves, and the budget goes to the stages that shorten a step most per move.

Dimension letters: L layers, E experts, G groups, K kinds, C candidates, N stages.
"""

from __future__ import annotations

import numpy as np

from cluster.errors import PlacementError
from cluster.placement.allotments import best_allotments, by_speed
from cluster.placement.deal import deal
from cluster.placement.fill import Slots
from cluster.placement.free import equal_groups, nothing_empty, unless_emptied
from cluster.placement.problem import Floats, Ints, Problem, Today, slowest_of

MOST_STAGES = 64

Found = tuple[Ints, Ints]
"""Allotment [G, K] and owner [L, E]."""


def relabelled(problem: Problem, allotment: Ints, owner: Ints, today: Today) -> Found:
    """The same plan with its groups named so that few experts change their group, greedily by common experts.

    Groups of equal devices may exchange their experts in each layer by itself.
    """
    groups = len(allotment)
    known = problem.real & (today.owner >= 0) & (today.owner < groups)
    common = np.zeros((len(owner), groups, groups), dtype=np.int64)
    layer = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)
    np.add.at(common, (layer[known], owner[known], today.owner[known]), 1)
    label = _matched(common.sum(axis=0))
    order = np.argsort(label)
    allotment, owner, common = allotment[order], label[owner], common[:, order]
    names = np.tile(np.arange(groups), (len(owner), 1))
    for same in equal_groups(allotment):
        for index in range(len(owner)):
            names[index, same] = same[_matched(common[index][np.ix_(same, same)])]
    return allotment, unless_emptied(problem, np.take_along_axis(names, owner, axis=1), owner)


def _matched(common: Ints) -> Ints:
    """[G] a column for each row of [G, G], so that the sum is large: the largest number first."""
    left = common.copy()
    column = np.empty(len(left), dtype=np.int64)
    for _ in range(len(left)):
        row, best = np.unravel_index(left.argmax(), left.shape)
        column[row] = best
        left[row, :] = left[:, best] = -1
    return column


def few_moves(problem: Problem, groups: int | None, today: Today, free: Found) -> Found | None:
    """The best plan found with at most `today.max_moves` moves; None where there is none.

    free: the plan without a budget, named after today's groups.
    """
    found = []
    for allotment in _allotments(problem, groups, today, free[0]):
        extra = free[1] if np.array_equal(allotment, free[0]) else None
        owner = _spent(problem, allotment, today, extra)
        if owner is not None:
            found.append((float(slowest_of(problem, allotment, owner).sum()), allotment, owner))
    if not found:
        return None
    _, allotment, owner = min(found, key=lambda each: each[0])
    return allotment, owner


def _allotments(problem: Problem, groups: int | None, today: Today, free: Ints) -> list[Ints]:
    """Devices for today's groups as they are, and what is good without them, the fastest for the hottest of today."""
    now = int(today.owner.max()) + 1
    choices = [free]
    if groups in (None, now):
        dealt = deal(problem, today.owner, now)
        choices += [] if dealt is None else [dealt]
    counts = {len(free), *([now] if groups is None else [])}
    for count in sorted(counts):
        try:
            good, _ = best_allotments(problem, count, 2)
        except PlacementError:
            continue
        held = problem.real & (today.owner < count)
        load = np.bincount(today.owner[held], weights=problem.weights[held], minlength=count)
        hottest = np.argsort(-load, kind="stable")
        choices += [by_speed(problem, each)[np.argsort(hottest)] for each in good]
    return choices


def _spent(problem: Problem, allotment: Ints, today: Today, extra: Ints | None) -> Ints | None:
    """Owner [L, E] with the budget spent on this allotment; None where it is not enough."""
    start = _seated(problem, allotment, today.owner)
    groups = len(allotment)
    empty = groups - len(np.unique(start[problem.real]))
    budget = today.max_moves - empty
    stages = _stages(problem, allotment, start)
    if extra is not None:
        stages.append(extra)
    owners = np.stack(stages)
    moves = np.stack([today.moves(owner) for owner in stages])
    times = np.stack([slowest_of(problem, allotment, owner) for owner in stages])
    if moves[0].sum() > budget:
        return None
    chosen = _chosen(moves, times, budget)
    owner = nothing_empty(problem, owners[chosen, np.arange(len(chosen))], groups)
    return owner if today.moves(owner).sum() <= today.max_moves else None


def _seated(problem: Problem, allotment: Ints, owner: Ints) -> Ints:
    """[L, E] today's groups where they still are and have room; the others by longest processing time first."""
    speed, room = problem.speed_of(allotment), problem.capacity_of(allotment)
    seated = np.where(owner < len(allotment), owner, -1)
    for layer, experts in enumerate(problem.experts):
        row, weights = seated[layer], problem.weights[layer]
        load, held = np.zeros(len(room)), np.zeros(len(room), dtype=np.int64)
        # Hottest first both times, so that it is the coldest of a group that must leave it.
        order = [expert for expert in problem.hottest_first[layer] if expert < experts]
        for settle in (False, True):
            for expert in order:
                if settle == (row[expert] >= 0):
                    continue
                group = (
                    int(np.where(held < room, (load + weights[expert]) / speed, np.inf).argmin())
                    if settle
                    else (int(row[expert]))
                )
                if held[group] == room[group]:
                    row[expert] = -1
                    continue
                row[expert] = group
                load[group] += weights[expert]
                held[group] += 1
    return seated


def _stages(problem: Problem, allotment: Ints, owner: Ints) -> list[Ints]:
    """Owners [L, E] from `owner` on, in each layer one swap better than before, until none helps."""
    shape = (len(owner), len(allotment))
    speed = np.broadcast_to(problem.speed_of(allotment), shape)
    slots = Slots(problem.weights, owner, speed, np.broadcast_to(problem.capacity_of(allotment), shape))
    stages = [owner]
    rows = np.arange(len(owner))
    while len(rows) and len(allotment) > 1 and len(stages) < MOST_STAGES:
        rows = slots.swap_slowest(rows, len(allotment) - 1)
        if len(rows):
            stages.append(slots.owner(owner.shape[1]))
    return stages


def _chosen(moves: Ints, times: Floats, budget: int) -> Ints:
    """[L] the stage of each layer: always the step with the most time saved per move, while the budget lasts.

    moves, times: [N, L]; stage 0 is where all start.
    """
    layers = np.arange(moves.shape[1])
    chosen = np.zeros(moves.shape[1], dtype=np.int64)
    left = budget - int(moves[0].sum())
    while True:
        cost = moves - moves[chosen, layers]
        gain = times[chosen, layers] - times
        useful = (gain > 1e-12 * times[0]) & (cost <= left)
        worth = np.where(useful, gain / np.maximum(cost, 0.5), -np.inf)
        stage, layer = np.unravel_index(worth.argmax(), worth.shape)
        if not useful[stage, layer]:
            return chosen
        left -= int(cost[stage, layer])
        chosen[layer] = stage

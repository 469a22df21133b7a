"""The best plan of a small problem, by looking at everything: every allotment, and every way to split every layer.

For one allotment the layers are independent but for the moves they share. A layer is solved by dynamic programming over
subsets: the best way to give the experts S to groups 0 .. g is the best split of S into what g takes and the rest. The
moves are then shared out between the layers, and between groups that must hold something somewhere.

Dimension letters: L layers, E experts, M moves of a layer, B moves in all, S = 2^E subsets, P = 3^E pairs of a subset
and a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from cluster.placement.allotments import Allotment, Group
from cluster.placement.problem import Floats, Ints, Problem, Today

MOST_EXPERTS = 8
MOST_DEVICES = 4


def is_small(problem: Problem) -> bool:
    """Whether `solve` takes it: the time grows as 3^E and as the partitions of the devices."""
    return problem.most_experts <= MOST_EXPERTS and int(problem.available.sum()) <= MOST_DEVICES


def solve(problem: Problem, groups: int | None, today: Today | None) -> tuple[Ints, Ints] | None:
    """Allotment [G, K] and owner [L, E] with the least sum over layers of the slowest group's time; no group is empty.

    groups: exactly so many; None: any number. None where no plan is within today's moves, or the groups do not fit.
    """
    solver = _Solver(problem, today)
    found = []
    for allotment in _all_allotments(problem, groups, ordered=today is not None):
        cost = solver.cost(allotment)
        if np.isfinite(cost):
            found.append((cost, allotment))
    best, answer = np.inf, None
    for cost, allotment in sorted(found):
        # Without its empty groups forbidden an allotment only seems better than it is, never worse.
        if cost >= best:
            break
        cost, owner = solver.without_empty_groups(allotment)
        if cost < best:
            best, answer = cost, (np.array(allotment, dtype=np.int64), owner)
    return answer


def fewest_moves(problem: Problem, groups: int | None, today: Ints) -> int:
    """Moves from `today` [L, E] that no plan on these devices can do without."""
    everything = int(problem.experts.sum())
    solver = _Solver(problem, Today(today, everything))
    costs = [solver.by_moves(allotment) for allotment in _all_allotments(problem, groups, ordered=True)]
    return int(np.flatnonzero(np.isfinite(np.min(costs, axis=0)))[0])


def _all_allotments(problem: Problem, groups: int | None, ordered: bool) -> Iterator[Allotment]:
    """All that hold the largest layer, with devices left over too; one of each set of equals where not `ordered`."""

    def extend(chosen: Allotment, left: Group) -> Iterator[Allotment]:
        if chosen and groups in (None, len(chosen)):
            yield chosen
        for group in product(*(range(count + 1) for count in left)):
            if any(group) and (ordered or not chosen or group <= chosen[-1]):
                yield from extend((*chosen, group), tuple(a - b for a, b in zip(left, group, strict=True)))

    for allotment in extend((), tuple(problem.available.tolist())):
        room = problem.capacity_of(np.array(allotment))
        if room.sum() >= problem.most_experts and len(allotment) <= problem.experts.sum():
            yield allotment


@dataclass(eq=False)
class _Solver:
    problem: Problem
    today: Today | None
    stages: dict[tuple[tuple[float, int, bool], ...], Floats] = field(default_factory=dict)
    """Groups so far, each (speed, room, must hold something) -> [L, M + 1, S] least time."""

    def __post_init__(self) -> None:
        experts = self.problem.most_experts
        subsets = np.arange(1 << experts)
        bits = (subsets[:, None] >> np.arange(experts)) & 1
        self.size = bits.sum(axis=1)
        self.load = self.problem.weights @ bits.T.astype(np.float64)
        self.all_experts = (1 << self.problem.experts) - 1
        pairs = [(whole, part) for whole in range(1 << experts) for part in _parts(whole)]
        self.whole, self.part = np.array(pairs, dtype=np.int64).T
        self.starts = np.searchsorted(self.whole, subsets)
        self.budget = min(self.today.max_moves, int(self.problem.experts.sum())) if self.today else 0
        self.layer_moves = min(self.budget, experts)

    def moved(self, group: int) -> Ints:
        """[L, S] experts of each subset that `group` does not hold today."""
        if self.today is None:
            return np.zeros_like(self.load, dtype=np.int64)
        away = self.today.owner != group
        bits = (np.arange(len(self.size))[:, None] >> np.arange(away.shape[1])) & 1
        return np.asarray(away.astype(np.int64) @ bits.T)

    def stage(self, kinds: tuple[tuple[float, int, bool], ...]) -> Floats:
        """[L, M + 1, S] least time of the groups `kinds` with exactly S on them and exactly M experts moved there."""
        if kinds in self.stages:
            return self.stages[kinds]
        if not kinds:
            table = np.full((len(self.load), self.layer_moves + 1, len(self.size)), np.inf)
            table[:, 0, 0] = 0.0
        else:
            table = self._extended(self.stage(kinds[:-1]), len(kinds) - 1, *kinds[-1])
        self.stages[kinds] = table
        return table

    def _extended(self, before: Floats, group: int, speed: float, room: int, must_hold: bool) -> Floats:
        keep = (self.size[self.part] <= room) & (self.size[self.part] >= must_hold)
        time = np.where(keep, self.load[:, self.part] / speed, np.inf)
        rest = self.whole ^ self.part
        moved = self.moved(group)[:, self.part]
        layer = np.arange(len(self.load))[:, None]
        table = np.empty_like(before)
        for moves in range(before.shape[1]):
            earlier = moves - moved
            candidate = np.maximum(np.where(earlier >= 0, before[layer, np.maximum(earlier, 0), rest], np.inf), time)
            table[:, moves] = np.minimum.reduceat(candidate, self.starts, axis=1)
        return table

    def kinds(self, allotment: Allotment, must_hold: int = 0) -> tuple[tuple[float, int, bool], ...]:
        """The groups of an allotment; `must_hold` has a bit for each that must hold something."""
        array = np.array(allotment)
        speed, room = self.problem.speed_of(array).tolist(), self.problem.capacity_of(array).tolist()
        return tuple((speed[g], room[g], bool(must_hold >> g & 1)) for g in range(len(allotment)))

    def by_layer(self, kinds: tuple[tuple[float, int, bool], ...]) -> Floats:
        """[L, M + 1] least time of each whole layer."""
        return np.asarray(self.stage(kinds)[np.arange(len(self.load)), :, self.all_experts])

    def by_moves(self, allotment: Allotment) -> Floats:
        """[B + 1] least sum over layers by moves in all; a group may be empty."""
        best = np.full(self.budget + 1, np.inf)
        best[0] = 0.0
        for layer in self.by_layer(self.kinds(allotment)):
            best, _ = _shared(best, layer)
        return best

    def cost(self, allotment: Allotment) -> float:
        """Least sum over layers of the slowest group's time; a group may be empty."""
        return float(self.by_moves(allotment).min())

    def without_empty_groups(self, allotment: Allotment) -> tuple[float, Ints]:
        """Least sum and its owners [L, E] where every group holds something in some layer.

        Over the layers: the least sum by (groups seen to hold something, moves so far). A layer adds any set of groups
        that must hold something in it.
        """
        everyone = (1 << len(allotment)) - 1
        kinds = [self.kinds(allotment, must_hold) for must_hold in range(everyone + 1)]
        layers = [self.by_layer(each) for each in kinds]
        best = np.full((everyone + 1, self.budget + 1), np.inf)
        best[0, 0] = 0.0
        steps = []
        for layer in range(len(self.load)):
            after = np.full_like(best, np.inf)
            step = np.zeros((*best.shape, 3), dtype=np.int64)  # groups before, groups of this layer, its moves
            for before, must_hold in product(range(everyone + 1), repeat=2):
                sums, here = _shared(best[before], layers[must_hold][layer])
                seen = before | must_hold
                better = sums < after[seen]
                after[seen, better] = sums[better]
                step[seen, better] = np.column_stack(
                    [np.full(better.sum(), before), np.full(better.sum(), must_hold), here[better]]
                )
            best = after
            steps.append(step)
        owner = np.full(self.problem.weights.shape, -1, dtype=np.int64)
        state, moves = everyone, int(best[everyone].argmin())
        cost = float(best[everyone, moves])
        if np.isfinite(cost):
            for layer in reversed(range(len(steps))):
                state, must_hold, moved = steps[layer][state, moves].tolist()
                self._trace(owner[layer], layer, kinds[must_hold], moved)
                moves -= moved
        return cost, owner

    def _trace(self, owner: Ints, layer: int, kinds: tuple[tuple[float, int, bool], ...], moves: int) -> None:
        """Write who holds what into `owner` [E], from the last group back to the first."""
        left = int(self.all_experts[layer])
        for group in reversed(range(len(kinds))):
            speed, room, must_hold = kinds[group]
            target = self.stage(kinds[: group + 1])[layer, moves, left]
            before, moved = self.stage(kinds[:group])[layer], self.moved(group)[layer]
            for part in _parts(left):
                earlier = moves - int(moved[part])
                if earlier < 0 or not must_hold <= self.size[part] <= room:
                    continue
                if max(before[earlier, left ^ part], self.load[layer, part] / speed) == target:
                    owner[[e for e in range(len(owner)) if part >> e & 1]] = group
                    left, moves = left ^ part, earlier
                    break


def _shared(best: Floats, layer: Floats) -> tuple[Floats, Ints]:
    """Least sum [B + 1] of what was and one more layer [M + 1], and the moves of that layer."""
    total = np.full((len(layer), len(best)), np.inf)
    for moves, cost in enumerate(layer):
        total[moves, moves:] = best[: len(best) - moves] + cost
    return total.min(axis=0), total.argmin(axis=0)


def _parts(whole: int) -> Iterator[int]:
    """All subsets of the bits of `whole`, itself first and none last."""
    part = whole
    while True:
        yield part
        if part == 0:
            return
        part = (part - 1) & whole

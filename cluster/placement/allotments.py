"""Which devices serve which group: the search over allotments, by bounds that need no experts to be placed.

Sharing devices never hurts a step: two groups made one finish no later than the slower of the two did. What it costs
is slots, because both devices then hold the same experts. So the search starts with every device alone and joins groups
while there are slots enough, then moves and exchanges single devices while the bound falls. One kind of device with few
to spare is searched completely.

An allotment is here a tuple of groups in falling order, each a tuple: devices of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement

import numpy as np

from cluster.errors import PlacementError
from cluster.placement.problem import Ints, Problem, bounds

Group = tuple[int, ...]
Allotment = tuple[Group, ...]

MOST_SPARE = 8
"""Devices beyond one a group up to which one kind is searched completely: 67 allotments."""
MOST_STEPS = 32
"""Of the last search, over single devices. One step looks at all of them."""
PATIENCE = 8
"""Joins after which a search that got no better ends."""


def best_allotments(problem: Problem, groups: int | None, keep: int) -> tuple[list[Allotment], float]:
    """Up to `keep` allotments by rising bound, of exactly `groups` groups or of as many as are best.

    And a sum over layers that no plan is below: the least of all allotments, 0.0 where only some were looked at.

    Raises:
        PlacementError: the experts do not fit, or not into that many groups.
    """
    check_fit(problem, groups)
    spare = int(problem.available.sum()) - (groups or fewest_groups(problem))
    if len(problem.kinds) == 1 and spare <= MOST_SPARE:
        search = _Search(problem, groups)
        search.look_at(_all_of_one_kind(problem, groups))
        best = search.best(keep)
        return best, search.scores[best[0]]
    search = _Search(_thinned(problem), groups)
    search.join()
    search.refine()
    return search.best(keep), 0.0


def fewest_groups(problem: Problem) -> int:
    """Groups that the largest layer needs at least: as many of the largest devices as hold all its experts."""
    largest = np.sort(np.repeat(problem.slots, problem.available))[::-1]
    return int(np.searchsorted(np.cumsum(largest), problem.most_experts)) + 1


def check_fit(problem: Problem, groups: int | None) -> None:
    """That the experts fit on the devices, in `groups` groups where that is given.

    Raises:
        PlacementError: they do not; one sentence with what would do.
    """
    devices, most = int(problem.available.sum()), problem.most_experts
    slots = int((problem.slots * problem.available).sum())
    if slots < most:
        raise PlacementError(
            f"--budget: {devices} devices with {slots} slots in all cannot hold the {most} experts of a layer; "
            f"allowed: at least {most} slots."
        )
    fewest = fewest_groups(problem)
    if groups is not None and not fewest <= groups <= min(devices, most):
        raise PlacementError(
            f"--groups: {groups} groups of up to {most} experts a layer do not fit on these {devices} devices; "
            f"allowed: {fewest} to {min(devices, most)}."
        )


class _Search:
    """Allotments seen so far, with their scores."""

    def __init__(self, problem: Problem, groups: int | None) -> None:
        self.problem, self.groups = problem, groups
        self.scores: dict[Allotment, float] = {}
        self.perfect = float(problem.weights.sum() / (problem.speeds @ problem.available))
        self.alone = [
            tuple(int(kind == other) for other in range(len(problem.kinds))) for kind in range(len(problem.kinds))
        ]

    def allowed(self, allotment: Allotment) -> bool:
        """Whether a plan may have this allotment, which has been looked at; on the way there are others."""
        count = len(allotment)
        few = count <= self.problem.most_experts and self.groups in (None, count)
        return few and self.scores.get(allotment, 0.0) < np.inf

    def look_at(self, allotments: Iterable[Allotment]) -> Allotment | None:
        """Score those that fit; returns the best of them, of equals the one that joined the slowest devices."""
        new = list(dict.fromkeys(allotments))
        unknown = [allotment for allotment in new if allotment not in self.scores]
        if unknown:
            array = padded(unknown)
            fits = self.problem.capacity_of(array).sum(axis=1) >= self.problem.most_experts
            scores = np.full(len(unknown), np.inf)
            if fits.any():
                scores[fits] = bounds(self.problem, array[fits]).sum(axis=1)
            self.scores.update(zip(unknown, scores.tolist(), strict=True))
        new = [allotment for allotment in new if self.scores[allotment] < np.inf]
        return min(new, key=lambda allotment: (round(self.scores[allotment], 9), allotment), default=None)

    def join(self) -> None:
        """From every device alone to few groups, each time by the join with the best bound."""
        now: Allotment | None = _ordered(
            group for group, count in zip(self.alone, self.problem.available, strict=True) for _ in range(count)
        )
        now, since, best = self.look_at([now] if now else []), 0, np.inf
        while now is not None and since < PATIENCE and len(now) > (self.groups or 1):
            now = self.look_at(self._joined(now))
            if now is not None and self.allowed(now):
                since = 0 if self.scores[now] < best else since + 1
                best = min(best, self.scores[now])
                if best <= self.perfect * (1 + 1e-9):
                    return

    def _joined(self, now: Allotment) -> Iterator[Allotment]:
        kinds = sorted(set(now))
        for one, other in combinations_with_replacement(kinds, 2):
            if one != other or now.count(one) > 1:
                yield _replaced(now, (one, other), (_sum(one, other),))
        for group in kinds:
            if sum(group) == 1:
                yield _replaced(now, (group,), ())

    def refine(self) -> None:
        """Move and exchange single devices from the best allotment on, while the bound falls."""
        if not any(map(self.allowed, self.scores)):
            self.look_at([self._start()])
        now: Allotment | None = self.best(1)[0]
        for _ in range(MOST_STEPS):
            assert now is not None
            score = self.scores[now]
            now = self.look_at(filter(self.allowed, self._changed(now)))
            if now is None or self.scores[now] >= score * (1 - 1e-9):
                return

    def _start(self) -> Allotment:
        """As many groups as are asked for, each one of the largest devices; joining alone did not get there."""
        order = np.argsort(-self.problem.slots, kind="stable")
        count = self.groups or fewest_groups(self.problem)
        largest = [self.alone[kind] for kind in order for _ in range(self.problem.available[kind])]
        return _ordered(largest[:count])

    def _changed(self, now: Allotment) -> Iterator[Allotment]:
        kinds = sorted(set(now))
        used = np.sum(now, axis=0)
        spare = [one for one, left in zip(self.alone, self.problem.available - used, strict=True) if left > 0]
        for one in spare:
            yield _ordered((*now, one))
            yield from (_replaced(now, (group,), (_sum(group, one),)) for group in kinds)
        for group in kinds:
            for one in self.alone:
                if sum(group) < 2 or not _holds(group, one):
                    continue
                rest = _difference(group, one)
                yield _replaced(now, (group,), (rest, one))
                yield _replaced(now, (group,), (rest,))
                for other in kinds:
                    if other != group or now.count(group) > 1:
                        yield _replaced(now, (group, other), (rest, _sum(other, one)))
        yield from self._exchanged(now, kinds, spare)

    def _exchanged(self, now: Allotment, kinds: list[Group], spare: list[Group]) -> Iterator[Allotment]:
        for group in kinds:
            for one in (one for one in self.alone if _holds(group, one)):
                for two in (two for two in self.alone if two != one):
                    without = _sum(_difference(group, one), two)
                    if two in spare:
                        yield _replaced(now, (group,), (without,))
                    for other in kinds:
                        if _holds(other, two) and (other != group or now.count(group) > 1):
                            with_one = _sum(_difference(other, two), one)
                            yield _replaced(now, (group, other), (without, with_one))

    def best(self, keep: int) -> list[Allotment]:
        """By rising score."""
        allowed = filter(self.allowed, self.scores)
        return sorted(allowed, key=lambda allotment: (round(self.scores[allotment], 9), allotment))[:keep]


def padded(allotments: list[Allotment]) -> Ints:
    """[C, G, K], groups without a device where an allotment has fewer."""
    most = max(map(len, allotments))
    array = np.zeros((len(allotments), most, len(allotments[0][0])), dtype=np.int64)
    for index, allotment in enumerate(allotments):
        array[index, : len(allotment)] = allotment
    return array


def by_speed(problem: Problem, allotment: Allotment) -> Ints:
    """[G, K] the fastest group first."""
    array = np.array(allotment, dtype=np.int64)
    return np.asarray(array[np.argsort(-problem.speed_of(array), kind="stable")])


def _all_of_one_kind(problem: Problem, groups: int | None) -> Iterator[Allotment]:
    """Every way to give the devices of the one kind there is to `groups` groups, or to any number that is enough."""
    devices = int(problem.available[0])
    for count in [groups] if groups else range(fewest_groups(problem), devices + 1):
        for extra in _partitions(devices - count, count, devices):
            yield tuple((1 + more,) for more in (*extra, *[0] * (count - len(extra))))


def _partitions(whole: int, parts: int, most: int) -> Iterator[tuple[int, ...]]:
    """Falling tuples of up to `parts` numbers from 1 to `most` that add up to `whole`."""
    if whole == 0:
        yield ()
    elif parts > 0:
        for first in range(min(whole, most), 0, -1):
            yield from ((first, *rest) for rest in _partitions(whole - first, parts - 1, first))


def _thinned(problem: Problem) -> Problem:
    """Every n-th layer where there are many devices: enough to tell allotments apart."""
    step = max(1, len(problem.layers) * int(problem.available.sum()) // 4096)
    if step == 1:
        return problem
    return Problem(problem.layers[::step], problem.experts[::step], problem.weights[::step], problem.kinds)


def _ordered(groups: Iterable[Group]) -> Allotment:
    return tuple(sorted(groups, reverse=True))


def _replaced(now: Allotment, old: tuple[Group, ...], new: tuple[Group, ...]) -> Allotment:
    groups = list(now)
    for group in old:
        groups.remove(group)
    return _ordered([*groups, *new])


def _sum(one: Group, other: Group) -> Group:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _difference(one: Group, other: Group) -> Group:
    return tuple(a - b for a, b in zip(one, other, strict=True))


def _holds(group: Group, one: Group) -> bool:
    return all(a >= b for a, b in zip(group, one, strict=True))

"""Experts to groups whose devices are fixed: longest processing time first, then swaps. All layers at once.

Each layer is a problem of its own: machines (groups) of different speeds with limited numbers of jobs (slots), the
last to finish counts. Sources: Graham 1969 and Gonzalez, Ibarra and Sahni 1977 (longest first, each to the machine that
finishes it earliest); the swaps are the usual pairwise interchange, here of the slowest group's experts.

Dimension letters: R rows of the batch (a layer under an allotment), E experts, G groups, S slots of the largest group.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.problem import Floats, Ints

FEW_PARTNERS = 4
PAIRED_ROUNDS = 4
CLOSE = 1.002
"""A row this near to its bound is left alone."""
WORK = 600_000
"""Most (row, expert, expert) triples that are looked at, some milliseconds: most rows are close or stuck earlier."""
_ROUND = 10_000
"""What a round costs beside its triples, in triples."""

_FREE, _NO_SLOT = -1, -2
_NEVER = 1e30
_SURE = 1 + 1e-9


def longest_first(weights: Floats, speed: Floats, room: Ints) -> Ints:
    """Owner [R, E] of each expert. weights [R, E] fall along a row; speed [R, G]; room [R, G] slots, at least E in sum.

    Steps over experts, each step over all rows: about 12 us a step for 58 rows of 29 groups.
    """
    rows, experts = weights.shape
    groups = speed.shape[1]
    finish = np.where(room > 0, 0.0, np.inf)
    then = np.empty_like(finish)
    inverse = 1 / speed
    left = room.copy()
    flat_finish, flat_then, flat_left = finish.reshape(-1), then.reshape(-1), left.reshape(-1)
    base = np.arange(rows) * groups
    owner = np.empty((experts, rows), dtype=np.int64)
    columns = np.ascontiguousarray(weights.T)[:, :, None]
    roomy = int(room[room > 0].min()) - 1
    for expert in range(experts):
        np.multiply(inverse, columns[expert], out=then)
        np.add(finish, then, out=then)
        at = then.argmin(axis=1)
        at += base
        owner[expert] = at
        flat_finish[at] = flat_then[at]
        still = flat_left[at] - 1
        flat_left[at] = still
        # Before that no group can be full.
        if expert >= roomy:
            flat_finish[at[still == 0]] = np.inf
    owner -= base
    return owner.T


def finish_times(weights: Floats, owner: Ints, speed: Floats) -> Floats:
    """[R, G] load of each group over its speed."""
    rows, groups = speed.shape
    at = owner + (np.arange(rows) * groups)[:, None]
    load = np.bincount(at.ravel(), weights=weights.ravel(), minlength=rows * groups)
    return np.asarray(load.reshape(rows, groups) / speed)


class Slots:
    """Who sits where: every group has as many slots as it has room, so that a move is a swap with a free slot.

    item [R, G, S]: expert, or free, or no slot. weight [R, G, S]. load [R, G]. Mutable. An owner of -1 has no slot.
    """

    def __init__(self, weights: Floats, owner: Ints, speed: Floats, room: Ints) -> None:
        rows, experts = owner.shape
        groups, deepest = room.shape[1], int(room.max())
        self.speed = speed
        by_group = np.argsort(owner, axis=1, kind="stable")
        group = np.take_along_axis(owner, by_group, axis=1)
        row = np.broadcast_to(np.arange(rows)[:, None], owner.shape)
        unseated = (owner < 0).sum(axis=1)[:, None]
        held = np.bincount((group + row * groups)[group >= 0], minlength=rows * groups).reshape(rows, groups)
        first = np.cumsum(held, axis=1) - held + unseated
        place = np.arange(experts) - np.take_along_axis(first, np.maximum(group, 0), axis=1)
        row, group, place, expert = (array[group >= 0] for array in (row, group, place, by_group))
        self.item = np.where(np.arange(deepest) < room[:, :, None], _FREE, _NO_SLOT)
        self.item[row, group, place] = expert
        # A slot that is not there takes a weight with which no swap is ever worth it.
        self.weight = np.where(self.item == _NO_SLOT, -_NEVER, 0.0)
        self.weight[row, group, place] = weights[row, expert]
        self.load = np.where(self.item >= 0, self.weight, 0.0).sum(axis=2)

    def owner(self, experts: int) -> Ints:
        """[R, E] group of each expert; -1 without a slot."""
        row, group, place = np.nonzero(self.item >= 0)
        owner = np.full((len(self.item), experts), -1, dtype=np.int64)
        owner[row, self.item[row, group, place]] = group
        return owner

    def slowest(self) -> Floats:
        """[R] when the slowest group of each row finishes."""
        return np.asarray((self.load / self.speed).max(axis=1))

    def order(self, rows: Ints) -> Ints:
        """[r, G] the groups of each of `rows`, the first to finish first."""
        return np.argsort(self.load[rows] / self.speed[rows], axis=1)

    def swap_slowest(self, rows: Ints, partners: int) -> Ints:
        """In each of `rows` the best swap of the slowest group with one of the `partners` first to finish.

        Returns the rows in which one helped.
        """
        order = self.order(rows)
        return self._swap_best(rows, order[:, -1], order[:, :partners])

    def swap_in_pairs(self, rows: Ints) -> None:
        """In each of `rows` the best swap of the slowest group with the fastest, of the second slowest with the second
        fastest, and so on, all at once."""
        order = self.order(rows)
        pairs = order.shape[1] // 2
        slow, fast = order[:, : -pairs - 1 : -1], order[:, :pairs]
        self._swap_best(np.repeat(rows, pairs), slow.ravel(), fast.reshape(-1, 1))

    def _swap_best(self, rows: Ints, slow: Ints, others: Ints) -> Ints:
        """The best swap of group `slow` [r] with any of the groups `others` [r, P] of the same row, where one helps.

        A row may be there several times, each time with other groups. Returns the rows of swaps that were made.
        """
        deepest = self.weight.shape[2]
        load, inverse = self.load[rows, slow], 1 / self.speed[rows, slow]
        # How much load changes sides, [r, S, P, S], and when the two groups would finish then.
        shift = self.weight[rows, slow][:, :, None, None] - self.weight[rows[:, None], others][:, None]
        after = shift * -inverse[:, None, None, None]
        after += (load * inverse)[:, None, None, None]
        faster = 1 / self.speed[rows[:, None], others][:, None, :, None]
        shift *= faster
        shift += self.load[rows[:, None], others][:, None, :, None] * faster
        np.maximum(after, shift, out=after)
        after = after.reshape(len(rows), -1)
        best = after.argmin(axis=1)
        helps = after[np.arange(len(rows)), best] * _SURE < load * inverse
        mine, which, theirs = np.unravel_index(best[helps], (deepest, others.shape[1], deepest))
        row = rows[helps]
        self._swap(row, slow[helps], mine, others[helps, which], theirs)
        return np.asarray(row)

    def _swap(self, row: Ints, slow: Ints, mine: Ints, other: Ints, theirs: Ints) -> None:
        for array in (self.item, self.weight):
            array[row, slow, mine], array[row, other, theirs] = array[row, other, theirs], array[row, slow, mine]
        for group in (slow, other):
            # Summed again rather than added to, so that no error builds up.
            held = np.where(self.item[row, group] >= 0, self.weight[row, group], 0.0)
            self.load[row, group] = held.sum(axis=1)


def improve(weights: Floats, owner: Ints, speed: Floats, room: Ints, goal: Floats, work: int = WORK) -> Ints:
    """Swap until every row is close to its `goal` [R], a bound it cannot beat, or no swap helps, or the work is done.

    weights [R, E], owner [R, E], speed and room [R, G] as in `longest_first`. Returns the owners; no row gets slower.
    """
    groups = speed.shape[1]
    if groups == 1:
        return owner
    slots = Slots(weights, owner, speed, room)
    deepest = slots.weight.shape[2]
    goal = goal * CLOSE
    few = min(FEW_PARTNERS, groups - 1)
    open_rows = np.flatnonzero(slots.slowest() > goal)
    for _ in range(PAIRED_ROUNDS):
        cost = _ROUND + len(open_rows) * (groups // 2) * deepest * deepest
        if not len(open_rows) or work < cost:
            break
        slots.swap_in_pairs(open_rows)
        work -= cost
        open_rows = open_rows[slots.slowest()[open_rows] > goal[open_rows]]
    while len(open_rows) and work > 0:
        helped = slots.swap_slowest(open_rows, few)
        work -= _ROUND + len(open_rows) * deepest * deepest * few
        stuck = np.setdiff1d(open_rows, helped)
        if len(stuck) and groups - 1 > few:
            helped = np.union1d(helped, slots.swap_slowest(stuck, groups - 1))
            work -= _ROUND + len(stuck) * deepest * deepest * (groups - 1)
        open_rows = helped[slots.slowest()[helped] > goal[helped]]
    return slots.owner(weights.shape[1])

"""Devices to groups whose experts stay where they are: what a plan without moves can still do.

Dimension letters: L layers, G groups, K kinds, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import SupportsInt

import numpy as np

from cluster.placement.problem import Floats, Ints, Problem

MOST_STEPS = 64


def deal(problem: Problem, owner: Ints, groups: int) -> Ints | None:
    """Allotment [G, K] for groups that hold what `owner` [L, E] says; None where some group fits on no device left.

    One device for each group, the largest for the one with the most experts; the others one by one to where they
    shorten the layers most; then single devices change places while that helps.
    """
    layers = np.arange(len(owner))[:, None] * groups
    at = (owner + layers)[problem.real]
    size = len(owner) * groups
    load = np.asarray(np.bincount(at, problem.weights[problem.real], size), dtype=np.float64).reshape(-1, groups)
    need: Ints = np.bincount(at, minlength=size).reshape(-1, groups).max(axis=0)
    devices = np.repeat(np.arange(len(problem.kinds)), problem.available)
    devices = devices[np.argsort(-problem.slots[devices], kind="stable")]
    order = np.lexsort((-load.sum(axis=0), -need))
    if len(devices) < groups or (problem.slots[devices[:groups]] < need[order]).any():
        return None
    allotment = np.zeros((groups, len(problem.kinds)), dtype=np.int64)
    allotment[order, devices[:groups]] += 1
    for kind in sorted(devices[groups:], key=lambda kind: -problem.speeds[kind]):
        more = [_with(allotment, (group, kind, 1)) for group in np.flatnonzero(need <= problem.slots[kind])]
        allotment = _best(problem, load, [allotment, *more])
    for _ in range(MOST_STEPS):
        better = _best(problem, load, [allotment, *_changed(problem, allotment, load, need)])
        if better is allotment:
            break
        allotment = better
    return allotment


def _best(problem: Problem, load: Floats, candidates: list[Ints]) -> Ints:
    """The candidate with the least sum of slowest times; the first of equals. load [L, G]."""
    speed = problem.speed_of(np.stack(candidates))
    times = load[:, None] / speed
    # Where two groups are equally slow, speeding up one of them is a step on the way: the others count a little.
    score = (times.max(axis=2) + 1e-3 * np.sqrt((times**2).sum(axis=2))).sum(axis=0)
    least = int(score.argmin())
    return candidates[least if score[least] < score[0] * (1 - 1e-9) else 0]


def _changed(problem: Problem, allotment: Ints, load: Floats, need: Ints) -> Iterator[Ints]:
    """A device of another group, or one in exchange, for each group that is the slowest of some layer."""
    fits = need[:, None] <= problem.slots
    for slow in np.unique((load / problem.speed_of(allotment)).argmax(axis=1)):
        for other, kind in zip(*np.nonzero(allotment), strict=True):
            if other == slow or not fits[slow, kind]:
                continue
            taken = _with(allotment, (other, kind, -1), (slow, kind, 1))
            if allotment[other].sum() > 1:
                yield taken
            for back in np.flatnonzero(allotment[slow] * fits[other]):
                if back != kind:
                    yield _with(taken, (slow, back, -1), (other, back, 1))


def _with(allotment: Ints, *changes: tuple[SupportsInt, SupportsInt, int]) -> Ints:
    changed = allotment.copy()
    for group, kind, count in changes:
        changed[int(group), int(kind)] += count
    return changed

"""`decide` in a closed loop with a fleet that answers to it: it gets where it should, stays there, and costs little."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from typing import Any

import pytest

from autoscale.policy import PolicyState, decide
from autoscale.signals import Change, GroupLoad, RouterLoad, Signals, UnitCounts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import ClosedLoop, group_fleet

QUICK = {"max_replicas": 6, "downscale": {"after_s": 20, "max_step": 1}}


def spec(**defaults: Any) -> PolicySpec:
    return PolicySpec.model_validate({"version": 1, "defaults": QUICK | defaults})


def test_the_hot_group_grows_until_it_is_not_waited_for_alone_and_nobody_else_does() -> None:
    loop, rows = ClosedLoop(4, spec()), (40, 5, 5, 5)
    before_s = loop.step_s(rows)
    loop.run(rows, 60)
    assert loop.ready["experts-0"] >= 3
    assert all(loop.ready[name] == 1 for name in loop.names[1:])
    assert loop.step_s(rows) < before_s * 0.6
    alone = loop.step_s(rows) - loop.step_s((5, 5, 5, 5))
    assert alone <= 0.15 * loop.step_s(rows)


def test_two_groups_that_hide_each_other_both_grow() -> None:
    loop = ClosedLoop(4, spec())
    loop.run((40, 40, 5, 5), 60)
    assert loop.ready["experts-0"] == loop.ready["experts-1"] >= 3
    assert loop.ready["experts-2"] == loop.ready["experts-3"] == 1


def test_a_balanced_load_changes_nothing() -> None:
    assert ClosedLoop(4, spec(target_utilization=0.95)).run((30, 30, 30, 30), 60) == []


def test_replicas_follow_the_load_and_leave_with_it() -> None:
    loop = ClosedLoop(4, spec())
    loop.run((40, 5, 5, 5), 60)
    loop.run((5, 40, 5, 5), 200)
    assert loop.ready["experts-0"] == 1
    assert loop.ready["experts-1"] >= 3
    loop.run((1, 1, 1, 1), 200)
    assert set(loop.ready.values()) == {1}


@pytest.mark.parametrize("seed", range(8))
def test_a_noisy_steady_load_settles_and_then_changes_at_most_once_a_level(seed: int) -> None:
    chance = random.Random(seed)
    loop = ClosedLoop(4, spec(), noise=0.2, seed=seed)
    for _ in range(2):
        rows = [chance.choice((2, chance.uniform(1, 150))) for _ in range(4)]
        settled_s = 10 * 20 + 60
        changes = loop.run(rows, settled_s + 300)
        late = [(at, change.reason) for at, change in changes if at > settled_s]
        assert len(late) <= 1, (rows, late)
        for unit, turns in Counter(_turns(changes)).items():
            assert turns <= 1, (unit, rows, [change.reason for _, change in changes])


def _turns(changes: list[tuple[float, Change]]) -> list[str]:
    """Each unit once for every growth that came after a step down: what a load that flaps would show."""
    turns, shrunk = [], set()
    for _, change in changes:
        if change.after < change.before:
            shrunk.add(change.unit)
        elif change.unit in shrunk:
            shrunk.remove(change.unit)
            turns.append(change.unit)
    return turns


def test_a_step_of_the_load_is_not_overshot() -> None:
    loop = ClosedLoop(2, spec(target_critical_share=0.9))
    loop.run((5, 1), 30)
    changes = loop.run((40, 1), 120)
    assert all(change.after > change.before for _, change in changes)


@pytest.mark.parametrize(("groups", "limit_s"), [(64, 0.005), (250, 0.05)])
def test_it_costs_the_serve_controller_little(groups: int, limit_s: float) -> None:
    """Several times the 1.3 and 6 ms that it takes, so that a busy machine passes: a change of order would not."""
    chance, fleet = random.Random(0), group_fleet(groups, ("default", "h100"), routers=True, hard=16)
    policy, state = spec(), PolicyState()
    counts = {name: UnitCounts(1, 1) for name in fleet.units}
    taken = []
    for tick in range(30):
        loads: dict[str, GroupLoad | None] = {
            group: GroupLoad(
                chance.uniform(50, 900),
                chance.uniform(0.1, 0.5),
                chance.uniform(0, 0.2),
                None,
                5.0,
                {"default": 1000.0},
            )
            for group in fleet.groups
        }
        signals = Signals(counts, loads, RouterLoad(10, 2))
        started = time.perf_counter()
        state = decide(signals, policy, fleet, state, 0.2 * tick).state
        taken.append(time.perf_counter() - started)
    assert statistics.median(taken) < limit_s

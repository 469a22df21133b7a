"""Every change has a kind of reason that can be counted; each kind once."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import yaml

from autoscale.policy import Decision
from autoscale.signals import GROWTH, ROUTER, GroupLoad, Reason, RouterLoad, UnitCounts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import SPEED, Ticks, at, group_fleet

A, B = "experts-0", "experts-1"
SLOW = RouterLoad(3, 0, tpot_p95_ms=95)
BUSY = RouterLoad(30, 10)


def load(rows: float) -> GroupLoad:
    return GroupLoad(rows, speed_rows_per_s={"default": SPEED})


def waiting(alone: float, wait: float) -> GroupLoad:
    return GroupLoad(10.0, wait, alone, speed_rows_per_s={"default": SPEED})


Counts, Loads = Mapping[str, UnitCounts], Mapping[str, GroupLoad | None]
CASES: dict[Reason, tuple[str, Counts, Loads, RouterLoad | None]] = {
    Reason.MINIMUM: ("{defaults: {min_replicas: 2}}", {A: at(1)}, {}, None),
    Reason.MAXIMUM: ("{defaults: {max_replicas: 2}}", {A: at(4)}, {}, None),
    Reason.BUDGET: ("{budget: {replicas: 2}}", {A: at(2), B: at(1)}, {A: load(1), B: load(1)}, None),
    Reason.UTILIZATION: ("{}", {A: at(2)}, {A: load(1900)}, None),
    Reason.CRITICAL_PATH: ("{}", {A: at(1), B: at(1)}, {A: waiting(0.4, 0.6), B: waiting(0, 0.2)}, None),
    Reason.REQUESTS: ("{}", {ROUTER: at(2)}, {}, BUSY),
    Reason.LATENCY: (
        "{slo: {tpot_p95_ms: 80}}",
        {A: at(1), B: at(1)},
        {A: waiting(0.12, 0.6), B: waiting(0, 0.48)},
        SLOW,
    ),
    Reason.FIT: ("{}", {A: at(3)}, {A: load(1)}, None),
    Reason.PREEMPTED: ("{budget: {replicas: 4}}", {A: at(2), B: at(2)}, {A: load(1900), B: load(3)}, None),
    Reason.GIVEN_UP: ("{defaults: {startup: {budget_s: 5}}}", {A: at(1, 2)}, {A: load(1000)}, None),
}


@pytest.mark.parametrize("kind", Reason)
def test_each_kind_of_reason_is_given_by_its_case(kind: Reason) -> None:
    text, counts, loads, router = CASES[kind]
    decision = first_change(text, counts, loads, router)
    assert [change.kind for change in decision.changes][:1] == [kind]
    assert (decision.changes[0].after > decision.changes[0].before) is (kind in GROWTH)
    assert decision.given_up == ((A,) if kind is Reason.GIVEN_UP else ())


def first_change(text: str, counts: Counts, loads: Loads, router: RouterLoad | None) -> Decision:
    """The first decision of a minute in which nothing changes that changes something."""
    spec = PolicySpec(version=1, **yaml.safe_load(text))
    run = Ticks(group_fleet(2, routers=ROUTER in counts), spec)
    for _ in range(280):
        decision = run.tick(counts, loads, router, later_s=0.25)
        if decision.changes:
            return decision
    raise AssertionError(f"nothing changed under {text}")


def test_starts_are_given_up_once_and_again_after_the_back_off_even_where_no_target_changes() -> None:
    spec = PolicySpec(version=1, defaults={"startup": {"budget_s": 5, "backoff_s": 10}})  # type: ignore[arg-type]
    run = Ticks(group_fleet(1), spec)
    given_up_at = []
    for _ in range(160):
        if run.tick({A: at(0, 1)}, {}, later_s=0.25).given_up:  # the last one at home is kept, and tried on
            given_up_at.append(run.now - 1000)
    assert len(given_up_at) > 1
    assert given_up_at[0] == pytest.approx(5.5)

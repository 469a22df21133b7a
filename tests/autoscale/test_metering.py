"""What the autoscaler's numbers become, with a recorder for Ray. No Ray."""

from __future__ import annotations

import threading

import pytest

from autoscale.metering import PolicyMetering
from autoscale.policy import Decision
from autoscale.signals import ROUTER, Change, Fleet, Reason, UnitCounts, UnitFacts
from cluster.metrics import (
    ACTUAL_REPLICAS,
    DECISIONS,
    GIVEN_UP_STARTS,
    HELD_BACK,
    POLICY_ERROR,
    POLICY_FAILURES,
    POLICY_TICKS,
    SIGNAL_AGE_S,
    STARTING_REPLICAS,
    TARGET_REPLICAS,
)
from tests.recorder import Recorder

A, FAST = "experts-0", "experts-0-fast"
FLEET = Fleet({A: UnitFacts(A, A), FAST: UnitFacts(FAST, A, "fast"), ROUTER: UnitFacts(ROUTER, None)}, 8)
COUNTS = {A: UnitCounts(1, 1), FAST: UnitCounts(2, 3), ROUTER: UnitCounts(1, 1)}
GROWS = Change(A, A, "default", 1, 3, "experts-0: hot, 1 -> 3", Reason.UTILIZATION)
SHRINKS = Change(ROUTER, None, "default", 2, 1, "Router: idle, 2 -> 1", Reason.FIT)


@pytest.fixture
def metering() -> PolicyMetering:
    return PolicyMetering()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_targets_ready_and_starting_replicas_are_by_group_and_pool(
    metering: PolicyMetering, recorder: Recorder
) -> None:
    metering.decided(FLEET, COUNTS, Decision({A: 3}, held_back=("experts-1: no room",)), {A: 0.4, ROUTER: 2.5})
    metering.tell(recorder.meter)
    wanted = {(A, "default"): (3, 1, 2), (A, "fast"): (3, 2, 1), (ROUTER, "default"): (1, 1, 0)}
    for (group, pool), levels in wanted.items():
        told = [
            recorder.of(each, group=group, pool=pool) for each in (TARGET_REPLICAS, ACTUAL_REPLICAS, STARTING_REPLICAS)
        ]
        assert tuple(told) == levels
    assert recorder.of(SIGNAL_AGE_S, part=A) == 0.4
    assert recorder.of(SIGNAL_AGE_S, part=ROUTER) == 2.5
    assert recorder.of(HELD_BACK) == 1


def test_what_is_gone_is_told_no_more(metering: PolicyMetering) -> None:
    metering.decided(FLEET, COUNTS, Decision({}), {A: 0.4})
    metering.decided(FLEET, {A: UnitCounts(1, 1)}, Decision({}), {})
    late = Recorder()
    metering.tell(late.meter)
    assert {labels for name, labels in late.values if name == TARGET_REPLICAS.name} == {
        (("group", A), ("pool", "default"))
    }
    assert SIGNAL_AGE_S.name not in late.names


def test_changes_are_counted_by_group_direction_and_kind_of_reason(
    metering: PolicyMetering, recorder: Recorder
) -> None:
    meter = recorder.meter
    metering.decided(FLEET, COUNTS, Decision({}), {})
    metering.tell(meter)
    assert recorder.of(DECISIONS, group=A, direction="up", reason="utilization") == 0
    assert recorder.of(GIVEN_UP_STARTS, group=A, pool="fast") == 0
    for _ in range(2):
        metering.decided(FLEET, COUNTS, Decision({A: 3}, (GROWS, SHRINKS), given_up=(FAST,)), {})
        metering.tell(meter)
    assert recorder.of(DECISIONS, group=A, direction="up", reason="utilization") == 2
    assert recorder.of(DECISIONS, group=ROUTER, direction="down", reason="fit") == 2
    assert recorder.of(GIVEN_UP_STARTS, group=A, pool="fast") == 2


def test_ticks_failures_and_the_policy_file_are_told_from_the_start(
    metering: PolicyMetering, recorder: Recorder
) -> None:
    meter = recorder.meter
    metering.tell(meter)
    assert POLICY_ERROR.name not in recorder.names, "nobody has looked at the file yet"
    for error, level in ((None, 0), ("budget: wrong", 1), (None, 0)):
        metering.asked()
        metering.file_is(error)
        metering.tell(meter)
        assert recorder.of(POLICY_ERROR) == level
    metering.failed()
    metering.tell(meter)
    assert (recorder.of(POLICY_TICKS), recorder.of(POLICY_FAILURES)) == (3, 1)


def test_the_link_s_thread_reads_while_the_tick_writes(metering: PolicyMetering) -> None:
    changes = [Change(A, A, "default", 1, 2, "x", reason) for reason in Reason]
    failed: list[Exception] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                metering.tell(Recorder().meter)
        except Exception as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3000):
        group = f"experts-{number}"
        fleet = Fleet({group: UnitFacts(group, group)}, 8)
        made = Change(group, group, "default", 1, 2, "x", changes[number % len(changes)].kind)
        metering.decided(fleet, {group: UnitCounts(1, 1)}, Decision({}, (made,) if number < 300 else ()), {group: 1.0})
    stop.set()
    reader.join(10)
    assert not failed

"""Slow is told from stuck by the time of the next sign. Milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from threading import Event

import pytest

from deployments.router.vitals import Vitals
from tests.deployments.router.fake_backbone import FakeBackbone, FakeClock, make_engine, make_request, submit


def make(clock: FakeClock) -> Vitals:
    return Vitals(compute_s=10, experts_s=70, clock=clock)


def test_a_thread_at_work_is_stuck_when_its_next_sign_is_overdue() -> None:
    clock = FakeClock()
    vitals = make(clock)
    assert not vitals.stuck
    vitals.work()
    clock.now = 10
    assert not vitals.stuck
    clock.now = 10.1
    assert vitals.stuck
    vitals.work()
    assert not vitals.stuck


def test_a_thread_at_rest_is_never_stuck() -> None:
    clock = FakeClock()
    vitals = make(clock)
    vitals.work()
    vitals.rest()
    clock.now = 1e6
    assert not vitals.stuck


@pytest.mark.parametrize(("away_s", "stuck"), [(70.0, False), (70.1, True)])
def test_rows_that_are_away_have_as_long_as_their_failure_rule_allows(away_s: float, stuck: bool) -> None:
    clock = FakeClock()
    vitals = make(clock)
    seen = []

    def scatter(layer: int, *, meanwhile: Callable[[], None] | None = None) -> int:
        assert meanwhile is None
        clock.now += away_s
        seen.append(vitals.stuck)
        return layer + 1

    watched = vitals.watched(scatter)
    assert "meanwhile" in signature(watched).parameters
    assert [watched(layer, meanwhile=None) for layer in range(3)] == [1, 2, 3]
    assert seen == [stuck] * 3
    assert not vitals.stuck, "each return is a sign, however long the step takes"
    clock.now += 10.1
    assert vitals.stuck


def test_a_scatter_that_fails_is_a_sign_too() -> None:
    clock = FakeClock()
    vitals = make(clock)

    def scatter() -> None:
        clock.now += 71
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError):
        vitals.watched(scatter)()
    assert not vitals.stuck


def test_an_engine_that_hangs_in_a_step_stops_being_responsive_and_an_idle_one_does_not() -> None:
    clock, entered, leave = FakeClock(), Event(), Event()
    backbone = FakeBackbone()

    def hang(_: object) -> None:
        entered.set()
        assert leave.wait(10)

    backbone.before_forward = hang
    engine = make_engine(backbone, clock, vitals=make(clock))
    assert not engine.responsive, "it does not run yet"
    engine.start()
    try:
        leave.set()
        first = submit(engine, make_request([1, 2], "first", max_tokens=1))
        assert entered.wait(10)
        while not first.ended or engine.stats().running:
            assert engine.responsive
        clock.now += 100
        assert engine.responsive, "it rests"
        entered.clear()
        leave.clear()
        inbox = submit(engine, make_request([1, 2, 3], max_tokens=1))
        assert entered.wait(10)
        assert engine.responsive
        clock.now += 10.1
        assert engine.alive
        assert not engine.responsive
        leave.set()
        assert engine.drain(10)
        assert inbox.ended
    finally:
        leave.set()
        engine.stop()
    assert not engine.responsive

"""Which parts are told as stalled, and which only have no signals for a moment. Milliseconds."""

from __future__ import annotations

from autoscale.signals import ROUTER, GroupLoad, RouterLoad, Signals
from autoscale.stalls import Stalls

A, B = "experts-0", "experts-1"
FRESH = {A: 0.3, B: 0.3, ROUTER: 0.3}
MAX_AGE_S = 5.0


def signals(*without: str) -> Signals:
    groups = {group: None if group in without else GroupLoad(0.0) for group in (A, B)}
    return Signals({}, groups, None if ROUTER in without else RouterLoad(0.0, 0.0))


def stalled(*moments: tuple[float, Signals, dict[str, float]]) -> list[tuple[str, ...]]:
    stalls = Stalls()
    return [stalls.take(found, ages, MAX_AGE_S, now) for now, found, ages in moments]


def test_a_part_without_signals_is_stalled_only_once_that_lasts_however_new_its_reports_are() -> None:
    moments = [(float(now), signals(A), FRESH) for now in range(8)]
    assert stalled(*moments) == [()] * 6 + [(A,)] * 2
    again = [*moments[:4], (4.0, signals(), FRESH), *((float(now), signals(A), FRESH) for now in range(5, 10))]
    assert stalled(*again) == [()] * 10, "each change of replicas takes the signals for a moment"


def test_old_reports_are_told_at_once() -> None:
    assert stalled((0.0, signals(A), {**FRESH, A: 5.1})) == [(A,)]


def test_an_idle_cluster_is_not_stalled() -> None:
    assert stalled(*((float(now), signals(), FRESH) for now in range(20))) == [()] * 20


def test_what_does_not_run_is_not_stalled() -> None:
    starting = [(float(now), signals(A, B, ROUTER), {B: 0.3, A: 0.3}) for now in range(20)]
    assert stalled(*starting) == [()] * 20, "no router yet"
    one = [(float(now), signals(A), {B: 0.3, ROUTER: 0.3}) for now in range(20)]
    assert stalled(*one) == [()] * 20, "no replica of the group yet"


def test_a_clock_that_jumps_back_starts_the_wait_anew() -> None:
    assert stalled((100.0, signals(A), FRESH), (1.0, signals(A), FRESH), (5.0, signals(A), FRESH)) == [()] * 3

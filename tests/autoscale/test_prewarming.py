"""What is foreseen a machine's lead ahead: schedules and trends, placed as a decision would. Pure, no sleeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from autoscale.forecast import Trend
from autoscale.measure import Watched
from autoscale.prewarming import Outlook
from autoscale.signals import ROUTER, Fleet, GroupLoad, Signals, UnitFacts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import at

EIGHT = datetime(2026, 11, 30, 8, tzinfo=UTC)
"""When the schedule's entry begins; it lasts an hour."""
LEAD_S = 300.0
L4, H100 = ({"ray.io/accelerator-type": kind} for kind in ("L4", "H100"))
FLEET = Fleet(
    {
        unit.name: unit
        for unit in (
            UnitFacts("experts-0", "experts-0", gpus=1, speed_rows_per_s=100, selector=L4),
            UnitFacts("experts-0-h100", "experts-0", "h100", gpus=1, speed_rows_per_s=100, selector=H100),
            UnitFacts("experts-1", "experts-1", gpus=1, speed_rows_per_s=100, selector=L4),
        )
    },
    8,
    ((UnitFacts(ROUTER, None, cpus=1), 2),),
)
SCHEDULE = [{"cron": "0 8 * * *", "duration_s": 3600, "groups": {"experts-0": {"min_replicas": 3}}}]


def policy(**parts: Any) -> PolicySpec:
    pools = {"h100": {"cost": 4}}
    base = {"version": 1, "prewarm": {"lead_s": LEAD_S}, "pools": pools, "defaults": {"max_replicas": 6}}
    return PolicySpec.model_validate(base | parts)


@dataclass
class Ahead:
    """An outlook, its clock and what there is."""

    spec: PolicySpec
    fleet: Fleet = FLEET
    counts: dict[str, int] = field(default_factory=lambda: {"experts-0": 1, "experts-0-h100": 0, "experts-1": 1})
    outlook: Outlook = field(default_factory=Outlook)

    def seats(self, moment: datetime, watched: Mapping[str, Watched] | None = None) -> dict[str, tuple[int, bool]]:
        counts = {name: at(count) for name, count in self.counts.items()}
        load = GroupLoad(offered_rows_per_s=10.0)
        signals = Signals(counts, dict.fromkeys(("experts-0", "experts-1"), load), None)
        now = self.now(moment)
        found = self.outlook.seats(self.spec, self.fleet, signals, watched or {}, now, moment)
        return {seat.name: (seat.replicas, seat.peak) for seat in found}

    @staticmethod
    def now(moment: datetime) -> float:
        return 5000.0 + (moment - EIGHT).total_seconds()


def after(seconds: float) -> datetime:
    return EIGHT + timedelta(seconds=seconds)


def rising(moment: datetime, slope: float = 1.0, level: float = 100.0) -> dict[str, Watched]:
    """A trend that has risen in many windows."""
    now = Ahead.now(moment)
    return {"experts-0": Watched((1, 0), now, level, None, Trend(level, slope, now, level, now, 99))}


def test_a_schedule_is_seen_a_lead_ahead_and_until_it_ends() -> None:
    ahead = Ahead(policy(schedule=SCHEDULE))
    usual = {ROUTER: (2, False), "experts-1": (1, False)}
    assert ahead.seats(after(-LEAD_S - 1)) == {}
    for seconds in (-LEAD_S, -1, 0, 3599):
        assert ahead.seats(after(seconds)) == {**usual, "experts-0": (3, True)}, seconds
    assert ahead.seats(after(3600)) == {}


def test_an_entry_that_asks_for_no_more_than_usual_is_no_peak() -> None:
    entry = SCHEDULE[0] | {"groups": {"experts-0": {"min_replicas": 2}}}
    assert Ahead(policy(schedule=[entry], defaults={"min_replicas": 2, "max_replicas": 6})).seats(EIGHT) == {}


def test_routers_have_peaks_too() -> None:
    fleet = Fleet({**FLEET.units, ROUTER: UnitFacts(ROUTER, None, gpus=1)}, 8)
    ahead = Ahead(policy(schedule=[SCHEDULE[0] | {"groups": {}, "router": {"min_replicas": 2}}]), fleet)
    ahead.counts[ROUTER] = 1
    assert ahead.seats(EIGHT)[ROUTER] == (2, True)


def test_machines_that_no_decision_could_use_are_not_asked_for() -> None:
    ahead = Ahead(policy(schedule=SCHEDULE, budget={"gpus": {"default": 3, "h100": 0}}))
    assert ahead.seats(EIGHT)["experts-0"] == (2, True), "the third would not be granted: experts-1 has one of three"


def test_what_does_not_fit_the_best_pool_goes_to_the_next() -> None:
    ahead = Ahead(policy(schedule=SCHEDULE, budget={"gpus": {"default": 3}}))
    seats = ahead.seats(EIGHT)
    assert (seats["experts-0"], seats["experts-0-h100"]) == ((2, True), (1, True))


def test_two_entries_that_follow_each_other_are_both_foreseen() -> None:
    later = {"cron": "2 8 * * *", "duration_s": 3600, "groups": {"experts-*": {"min_replicas": 5}}}
    ahead = Ahead(policy(schedule=[*SCHEDULE, later]))
    assert ahead.seats(after(-LEAD_S))["experts-0"] == (3, True)
    seats = ahead.seats(after(-LEAD_S + 120))
    assert (seats["experts-0"], seats["experts-1"]) == ((5, True), (5, True))


def test_a_rise_that_the_forecast_believes_asks_for_its_replicas_and_is_held_for_a_lead() -> None:
    ahead = Ahead(policy(forecast={"trend_tau_s": 200}))
    ahead.counts["experts-0"] = 2
    assert ahead.seats(after(0), rising(after(0), slope=0.0)) == {}
    # 100 now, 114.7 at the forecast's own 15 s, at most twice the level in 300 s: 2 x 200 / 114.7 = 3.5 replicas.
    assert ahead.seats(after(0), rising(after(0)))["experts-0"] == (4, True)
    assert ahead.seats(after(LEAD_S))["experts-0"] == (4, True)
    assert ahead.seats(after(LEAD_S + 1)) == {}


def test_a_foreseen_peak_is_no_more_than_the_maximum_and_off_where_it_is_off() -> None:
    ahead = Ahead(policy(forecast={"trend_tau_s": 200}, defaults={"max_replicas": 3}))
    ahead.counts["experts-0"] = 2
    assert ahead.seats(EIGHT, rising(EIGHT))["experts-0"] == (3, True)
    ahead = Ahead(policy(forecast={"trend_tau_s": 200}, prewarm={"lead_s": LEAD_S, "forecast": False}))
    assert ahead.seats(EIGHT, rising(EIGHT)) == {}


def test_after_a_restart_nothing_is_let_go_before_a_foreseen_peak_would_show() -> None:
    ahead = Ahead(policy())
    assert [ahead.outlook.may_release(ahead.spec, now) for now in (0, LEAD_S - 1, LEAD_S)] == [False, False, True]
    assert not ahead.outlook.may_release(ahead.spec, -5), "a clock that jumped back"
    by_the_clock = policy(prewarm={"lead_s": LEAD_S, "forecast": False})
    assert Outlook().may_release(by_the_clock, 0), "schedules are known at once"
    assert Outlook().may_release(PolicySpec(version=1), 0)


def test_without_prewarm_nothing_is_looked_at() -> None:
    assert Ahead(policy(prewarm=None, schedule=SCHEDULE)).seats(EIGHT, rising(EIGHT)) == {}

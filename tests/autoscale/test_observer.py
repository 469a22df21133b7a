"""Reports of replicas to signals: rates over a window, ages, and what makes a number unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.observer import SETTLE_S, Observer
from autoscale.signals import ROUTER, Fleet, Signals, UnitFacts
from autoscale.spec import SignalsSpec

FLEET = Fleet(
    {
        unit.name: unit
        for unit in (
            UnitFacts("experts-0", "experts-0"),
            UnitFacts("experts-0-fast", "experts-0", "fast"),
            UnitFacts("experts-1", "experts-1"),
            UnitFacts(ROUTER, None),
        )
    },
    max_replicas_hard=8,
)
SPEC = SignalsSpec(window_s=5, max_age_s=2)


class Cluster:
    """Routers and replicas that report every half second, with loads that tests set."""

    def __init__(self) -> None:
        self.observer = Observer(FLEET)
        self.now = 100.0
        self.units: dict[str, dict[str, dict[str, float]]] = {
            ROUTER: {"r1": router()},
            "experts-0": {"a": replica(100.0)},
            "experts-0-fast": {},
            "experts-1": {"b": replica(50.0)},
        }
        self.rates: dict[str, dict[str, float]] = {}
        self.silent: set[str] = set()

    def run(self, seconds: float) -> Signals:
        """Let time pass; every replica's totals rise by its `rates`."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for unit, replicas in self.units.items():
                for name, report in replicas.items():
                    if name not in self.silent:
                        report["seq"] += 1
                        report["uptime_s"] += 0.5
                        for key, rate in self.rates.get(name, {}).items():
                            report[key] = report.get(key, 0.0) + 0.5 * rate
                copies = {name: dict(report) for name, report in replicas.items()}
                self.observer.see(unit, copies, self.now, SPEC.window_s)
        return self.observer.signals({}, ROUTER, SPEC, self.now)


def router() -> dict[str, float]:
    totals = ("steps", "step_s", "rows:experts-0", "rows:experts-1", "wait_s:experts-0", "wait_s:experts-1")
    totals += ("critical_s:experts-0", "critical_s:experts-1")
    return {"seq": 0.0, "uptime_s": 0.0, "running": 2.0, "waiting": 1.0, **dict.fromkeys(totals, 0.0)}


def replica(speed: float) -> dict[str, float]:
    return {"seq": 0.0, "uptime_s": 7.0, "rows": 0.0, "busy_s": 0.0, "queue_rows": 3.0, "speed_rows_per_s": speed}


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.rates["r1"] = {
        "steps": 10,
        "step_s": 0.8,
        "rows:experts-0": 40,
        "wait_s:experts-0": 0.6,
        "critical_s:experts-0": 0.4,
        "rows:experts-1": 5,
        "wait_s:experts-1": 0.2,
    }
    made.rates["a"] = {"rows": 40, "busy_s": 0.5}
    return made


def test_totals_become_rates_of_the_window_and_shares_of_step_time(cluster: Cluster) -> None:
    load = cluster.run(8).groups["experts-0"]
    assert load is not None
    assert load.offered_rows_per_s == pytest.approx(40)
    assert load.wait_share == pytest.approx(0.75)
    assert load.critical_share == pytest.approx(0.5)
    assert load.utilization == pytest.approx(0.5)
    assert load.queue_rows == 3


def test_a_busy_replica_s_speed_is_what_it_computes_a_busy_second_and_an_idle_one_s_what_was_measured(
    cluster: Cluster,
) -> None:
    signals = cluster.run(8)
    busy, idle = signals.groups["experts-0"], signals.groups["experts-1"]
    assert busy is not None
    assert idle is not None
    assert busy.speed_rows_per_s == {"default": pytest.approx(80)}
    assert busy.service_share == pytest.approx(40 / 80 / 0.8)
    assert idle.speed_rows_per_s == {"default": 50}


def test_rows_and_shares_are_summed_over_routers_by_their_step_time(cluster: Cluster) -> None:
    cluster.units[ROUTER]["r2"] = router()
    cluster.rates["r2"] = {"steps": 10, "step_s": 0.2, "rows:experts-0": 10, "wait_s:experts-0": 0.0}
    signals = cluster.run(8)
    load = signals.groups["experts-0"]
    assert load is not None
    assert load.offered_rows_per_s == pytest.approx(50)
    assert load.wait_share == pytest.approx(0.6)
    assert signals.router is not None
    assert (signals.router.running, signals.router.waiting) == (4, 2)


def test_prompts_to_come_are_rows_a_step_times_steps_a_second(cluster: Cluster) -> None:
    cluster.units[ROUTER]["r1"]["coming:experts-1"] = 2.5
    load = cluster.run(8).groups["experts-1"]
    assert load is not None
    assert load.coming_rows_per_s == pytest.approx(25)


def test_an_idle_cluster_is_known_to_offer_nothing_and_its_shares_are_unknown(cluster: Cluster) -> None:
    cluster.rates.clear()
    cluster.units[ROUTER]["r1"]["running"] = 0.0
    load = cluster.run(8).groups["experts-0"]
    assert load is not None
    assert load.offered_rows_per_s == 0
    assert load.wait_share is None
    assert load.critical_share is None


@pytest.mark.parametrize("name", ["r1", "a"])
def test_a_silent_router_or_replica_makes_its_groups_unknown_until_it_speaks(cluster: Cluster, name: str) -> None:
    assert cluster.run(8).groups["experts-0"] is not None
    cluster.silent.add(name)
    signals = cluster.run(SPEC.max_age_s + 1)
    assert signals.groups["experts-0"] is None
    assert (signals.router is None) == (name == "r1")
    assert (signals.groups["experts-1"] is None) == (name == "r1")
    cluster.silent.clear()
    assert cluster.run(2).groups["experts-0"] is not None


def test_a_step_that_lasts_longer_than_the_window_is_not_taken_for_an_idle_router(cluster: Cluster) -> None:
    assert cluster.run(8).groups["experts-0"] is not None
    cluster.rates.clear()
    assert cluster.run(8).groups["experts-0"] is None
    cluster.units[ROUTER]["r1"]["running"] = 0.0
    load = cluster.run(1).groups["experts-0"]
    assert load is not None
    assert load.offered_rows_per_s == 0


def test_a_replica_that_has_not_reported_yet_makes_its_group_unknown(cluster: Cluster) -> None:
    cluster.run(8)
    cluster.units["experts-0-fast"]["c"] = {"seq": math.nan, "uptime_s": 0.0}
    signals = cluster.run(4)
    assert signals.groups["experts-0"] is None
    assert signals.groups["experts-1"] is not None


def test_after_replicas_have_come_or_gone_only_what_was_seen_since_counts(cluster: Cluster) -> None:
    cluster.run(8)
    cluster.units["experts-0-fast"]["c"] = replica(1000.0)
    cluster.rates["r1"]["wait_s:experts-0"] = 0.1
    assert cluster.run(SETTLE_S).groups["experts-0"] is None
    load = cluster.run(1.0).groups["experts-0"]
    assert load is not None
    assert load.wait_share == pytest.approx(0.125), "nothing of the time with one replica"
    assert load.speed_rows_per_s["fast"] == 1000


def test_one_group_without_any_running_replica_is_unknown(cluster: Cluster) -> None:
    del cluster.units["experts-1"]["b"]
    assert cluster.run(8).groups["experts-1"] is None


def test_a_clock_that_jumps_back_makes_numbers_unknown_for_a_while_and_no_longer(cluster: Cluster) -> None:
    cluster.run(8)
    cluster.now -= 50
    cluster.run(0.5)
    assert cluster.run(4).groups["experts-0"] is not None


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=True), st.dictionaries(st.sampled_from(sorted(router())), st.floats())),
        max_size=8,
    )
)
def test_no_report_and_no_clock_raises(steps: list[tuple[float, dict[str, float]]]) -> None:
    observer = Observer(FLEET)
    for now, report in steps:
        for unit in FLEET.units:
            observer.see(unit, {"x": report}, now, SPEC.window_s)
        signals: Any = observer.signals({}, ROUTER, replace_window(now), now)
        for load in signals.groups.values():
            assert load is None or math.isfinite(load.offered_rows_per_s)


def replace_window(now: float) -> SignalsSpec:
    return SPEC.model_copy(update={"window_s": 1.0 if now > 0 else 5.0})


def test_the_age_of_a_part_is_that_of_its_most_silent_replica(cluster: Cluster) -> None:
    cluster.run(3)
    assert cluster.observer.ages(ROUTER, cluster.now) == {ROUTER: 0.0, "experts-0": 0.0, "experts-1": 0.0}
    cluster.units["experts-0-fast"]["c"] = replica(10.0)
    cluster.run(1)
    cluster.silent = {"c", "r1"}
    cluster.run(4)
    assert cluster.observer.ages(ROUTER, cluster.now) == {ROUTER: 4.0, "experts-0": 4.0, "experts-1": 0.0}


def test_one_that_has_never_reported_is_as_old_as_its_listing_and_one_that_is_gone_has_no_age(cluster: Cluster) -> None:
    cluster.run(3)
    for _ in range(4):
        cluster.observer.see("experts-1", {"b": {}, "new": {}}, cluster.now, SPEC.window_s)
        cluster.now += 1.0
    assert cluster.observer.ages(ROUTER, cluster.now)["experts-1"] == 4.0
    cluster.observer.see("experts-1", {}, cluster.now, SPEC.window_s)
    assert "experts-1" not in cluster.observer.ages(ROUTER, cluster.now)

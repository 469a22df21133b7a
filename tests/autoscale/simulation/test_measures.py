"""What the policy sees of a simulated cluster is what the observer would make of the same replicas' reports."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale.observer import Observer
from autoscale.signals import ROUTER, Fleet, UnitCounts, UnitFacts
from autoscale.simulation.measures import Measures, TickTotals
from autoscale.spec import SignalsSpec

CAPACITY = np.array([100.0, 200.0])


def tick(rows: float, wait: float, capacity: np.ndarray = CAPACITY, running: float = 3.0) -> TickTotals:
    amount = np.array([rows, 2 * rows])
    return TickTotals(
        rows=amount,
        wait_s=np.array([wait, wait / 2]),
        critical_s=np.array([wait / 2, 0.0]),
        busy_s=amount / capacity,
        capacity=capacity,
        step_s=0.4,
        steps=4.0,
        running=running,
        waiting=1.0,
        in_system=running + 1,
        coming=np.array([10.0, 5.0]),
        ttft_s=np.array([0.5]),
        gap_s=np.array([0.1, 0.2]),
        gap_count=np.array([10.0, 10.0]),
    )


def measures() -> Measures:
    return Measures(groups=2, tick_s=0.5, delivery_s=0.5, settle_s=1.0, report_s=0.5)


def test_the_signals_are_those_of_the_observer():
    fleet = Fleet({f"experts-{g}": UnitFacts(f"experts-{g}", f"experts-{g}") for g in range(2)}, 8)
    observer, ours = Observer(fleet), measures()
    totals = {"rows": np.zeros(2), "wait": np.zeros(2), "critical": np.zeros(2), "busy": np.zeros(2)}
    for k in range(40):
        now = 0.5 * k
        router = {"seq": k, "uptime_s": now, "steps": 4.0 * k, "step_s": 0.4 * k, "running": 3, "waiting": 1}
        for g in range(2):
            router |= {
                f"rows:experts-{g}": totals["rows"][g],
                f"wait_s:experts-{g}": totals["wait"][g],
                f"critical_s:experts-{g}": totals["critical"][g],
                f"coming:experts-{g}": (10.0, 5.0)[g],
            }
            report = {"seq": k, "uptime_s": now, "rows": totals["rows"][g], "busy_s": totals["busy"][g]}
            observer.see(f"experts-{g}", {"a": report | {"speed_rows_per_s": CAPACITY[g]}}, now, 5.0)
        observer.see(ROUTER, {"r": router}, now, 5.0)
        one = tick(10 + 5 * np.sin(k), 0.1)
        ours.record(one)
        for key, value in zip(totals, (one.rows, one.wait_s, one.critical_s, one.busy_s), strict=True):
            totals[key] = totals[key] + value
    # The simulated reports take a tick: both have seen 39 ticks now.
    counts = {f"experts-{g}": UnitCounts(1, 1) for g in range(2)}
    expected = observer.signals(counts, ROUTER, SignalsSpec(window_s=5), 0.5 * 39)
    seen = ours.seen(5.0)
    assert seen is not None
    for g in range(2):
        load = expected.groups[f"experts-{g}"]
        assert load is not None
        assert seen.valid[g]
        assert seen.offered_rows_per_s[g] == pytest.approx(load.offered_rows_per_s)
        assert seen.coming_rows_per_s[g] == pytest.approx(load.coming_rows_per_s)
        assert seen.wait_share[g] == pytest.approx(load.wait_share)
        assert seen.critical_share[g] == pytest.approx(load.critical_share)
        assert seen.service_share[g] == pytest.approx(load.service_share)
        assert seen.utilization[g] == pytest.approx(load.utilization)
        assert seen.speed[g] * CAPACITY[g] == pytest.approx(load.speed_rows_per_s["default"])
    assert expected.router is not None
    assert (seen.running, seen.waiting) == (expected.router.running, expected.router.waiting)


def test_nothing_is_known_at_first_and_of_a_group_right_after_its_replicas_changed():
    ours = measures()
    ours.record(tick(1, 0.1))
    assert ours.seen(5.0) is None
    for _ in range(20):
        ours.record(tick(1, 0.1))
    seen = ours.seen(5.0)
    assert seen is not None
    assert seen.valid.tolist() == [True, True]
    known = []
    for _ in range(6):
        ours.record(tick(1, 0.1, np.array([100.0, 400.0])))
        seen = ours.seen(5.0)
        assert seen is not None
        known.append(seen.valid.tolist())
    # Settled after 2 ticks, one report apart, one on the way.
    assert known == [[True, False]] * 4 + [[True, True]] * 2


def test_an_idle_cluster_has_no_shares_but_a_load_of_zero():
    ours = measures()
    for _ in range(10):
        still = tick(0, 0.0)
        ours.record(TickTotals(**{**vars(still), "step_s": 0.0, "steps": 0.0, "gap_count": np.zeros(2)}))
    seen = ours.seen(2.0)
    assert seen is not None
    assert np.isnan(seen.wait_share).all()
    assert seen.offered_rows_per_s.tolist() == [0, 0]
    assert seen.tpot_p95_ms is None
    assert seen.ttft_p95_ms == pytest.approx(500)


def test_serve_counts_requests_and_calls_in_flight():
    ours = measures()
    for _ in range(10):
        ours.record(tick(1, 0.25))
    assert ours.ongoing(2.0) == (pytest.approx(4.0), pytest.approx(np.array([0.5, 0.25])))

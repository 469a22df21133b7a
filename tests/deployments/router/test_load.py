"""A router's reports: shares cover the time since the report before, totals rise, unknown numbers are left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoscale.fleet import fleet_of
from autoscale.observer import Observer
from autoscale.spec import SignalsSpec
from cluster.config import parse_args
from cluster.fabric.dispatch import DispatchStats, GroupTraffic
from deployments.router.latency import Percentiles
from deployments.router.load import MIX_TAU_S, EngineStats, LoadMeter, LoadReporter
from deployments.router.routing import Shown
from deployments.router.sequence import Sequence, make_sequences
from tests.deployments.router.fake_backbone import FakeBackbone, FakeClock, make_request

ENGINE = EngineStats(
    running=2, waiting=1, kv_used_tokens=48, kv_tokens=1024, steps=0, tokens_generated=0, prefill_tokens=0,
    cached_tokens=0, preemptions=0, last_step_s=0.0, step_s=0.0,
)  # fmt: skip


def dispatch(critical_s: float, rows: int) -> DispatchStats:
    return DispatchStats(
        layers=2,
        scatters=0,
        tokens=0,
        resends=0,
        groups={"experts-0": GroupTraffic(rows=rows, critical_s=critical_s), "experts-1": GroupTraffic()},
        replicas={},
        transport_bytes={"stream": 10},
    )


def test_shares_cover_the_interval_since_the_last_report() -> None:
    meter = LoadMeter("r")
    first = meter.read(replace(ENGINE, step_s=2.0), dispatch(critical_s=1.0, rows=5))
    assert first.critical_share == pytest.approx({"experts-0": 0.5, "experts-1": 0.0})
    second = meter.read(replace(ENGINE, step_s=4.0), dispatch(critical_s=1.2, rows=9))
    assert second.critical_share == pytest.approx({"experts-0": 0.1, "experts-1": 0.0})
    assert (second.id, second.running, second.waiting, second.kv_used_tokens) == ("r", 2, 1, 48)
    assert second.group_rows == {"experts-0": 9, "experts-1": 0}
    assert second.transport_bytes == {"stream": 10}


def test_a_heartbeat_says_what_was_generated_and_how_quickly_and_nothing_where_nobody_waited() -> None:
    engine = replace(ENGINE, tokens_generated=90, preemptions=3)
    said = LoadMeter("r").read(engine, dispatch(0.0, 0), Percentiles(0.25, None))
    assert (said.tokens_generated, said.preemptions, said.ttft_p95_ms, said.tpot_p95_ms) == (90, 3, 250.0, None)


def test_without_a_step_there_is_no_share() -> None:
    assert LoadMeter("r").read(ENGINE, dispatch(critical_s=0.0, rows=0)).critical_share == {}


KEYS = {"seq", "uptime_s", "steps", "step_s", "tokens", "running", "waiting", "kv_used_share"}
PER_GROUP = ("rows", "wait_s", "critical_s", "coming")
NOTHING_WAITED = Percentiles(None, None)


def totals(rows: tuple[int, int], tokens: int, layers: int = 2) -> DispatchStats:
    """tokens: of all layers together."""
    groups = {f"experts-{index}": GroupTraffic(each, 0.5, 0.25) for index, each in enumerate(rows)}
    return DispatchStats(layers, scatters=0, tokens=tokens, resends=0, groups=groups, replicas={}, transport_bytes={})


def unseen(count: int) -> list[Sequence]:
    return [make_sequences(make_request([1, 2]), FakeBackbone(), 0)[0] for _ in range(count)]


def reporter(clock: FakeClock | None = None) -> LoadReporter:
    return LoadReporter(("experts-0", "experts-1"), clock or FakeClock())


def test_a_report_has_exactly_the_agreed_keys_all_of_them_floats() -> None:
    clock = FakeClock()
    clock.now = 50.0
    made = reporter(clock)
    clock.now = 52.5
    engine = replace(ENGINE, steps=7, tokens_generated=90, step_s=1.5, kv_used_tokens=256)
    report = made.read(engine, totals((30, 10), 20), Percentiles(0.25, 0.03125), [])
    assert report == {
        "seq": 1.0, "uptime_s": 2.5, "steps": 7.0, "step_s": 1.5, "tokens": 90.0,
        "running": 2.0, "waiting": 1.0, "kv_used_share": 0.25, "ttft_p95_ms": 250.0, "tpot_p95_ms": 31.25,
        "rows:experts-0": 30.0, "wait_s:experts-0": 0.5, "critical_s:experts-0": 0.25, "coming:experts-0": 0.0,
        "rows:experts-1": 10.0, "wait_s:experts-1": 0.5, "critical_s:experts-1": 0.25, "coming:experts-1": 0.0,
    }  # fmt: skip
    assert all(type(value) is float for value in report.values())
    assert [key for key in report if key.startswith("rows:")] == ["rows:experts-0", "rows:experts-1"]


def test_every_report_has_the_next_number() -> None:
    made = reporter()
    reports = [made.read(ENGINE, totals((0, 0), 0), NOTHING_WAITED, []) for _ in range(3)]
    assert [report["seq"] for report in reports] == [1.0, 2.0, 3.0]


def test_latency_is_left_out_where_nobody_waited_and_groups_where_there_are_none() -> None:
    local = LoadReporter((), FakeClock()).read(ENGINE, totals((30, 10), 20), NOTHING_WAITED, unseen(2))
    assert local.keys() == KEYS
    remote = reporter().read(ENGINE, totals((30, 10), 20), NOTHING_WAITED, unseen(2))
    assert remote.keys() == KEYS | {f"{key}:experts-{index}" for key in PER_GROUP for index in (0, 1)}


def test_unseen_prompts_will_use_the_mix_of_rows_so_far() -> None:
    # 10 tokens went through each of 2 layers, 2 rows each: 4 rows a token, 3 of them to the first group.
    report = reporter().read(ENGINE, totals((30, 10), 20), NOTHING_WAITED, unseen(5))
    assert (report["coming:experts-0"], report["coming:experts-1"]) == (15.0, 5.0)


def test_a_router_that_has_computed_nothing_expects_nothing() -> None:
    report = reporter().read(ENGINE, totals((0, 0), 0), NOTHING_WAITED, unseen(5))
    assert (report["coming:experts-0"], report["coming:experts-1"]) == (0.0, 0.0)


def test_prompts_that_have_shown_their_experts_need_no_mix() -> None:
    [sequence] = unseen(1)
    sequence.shown = Shown(np.array([4, 12]), 4)
    report = reporter().read(ENGINE, totals((30, 10), 20), NOTHING_WAITED, [sequence, *unseen(1)])
    assert (report["coming:experts-0"], report["coming:experts-1"]) == (1.0 + 3.0, 3.0 + 1.0)


def test_the_mix_follows_the_present_while_steps_run_and_stays_while_none_do() -> None:
    made = reporter()
    made.read(replace(ENGINE, step_s=1.0), totals((400, 0), 200), NOTHING_WAITED, [])
    for _ in range(1000):
        idle = made.read(replace(ENGINE, step_s=1.0), totals((400, 0), 200), NOTHING_WAITED, unseen(1))
    assert (idle["coming:experts-0"], idle["coming:experts-1"]) == pytest.approx((4.0, 0.0))
    later = replace(ENGINE, step_s=1.0 + 3 * MIX_TAU_S)
    turned = made.read(later, totals((400, 400), 400), NOTHING_WAITED, unseen(1))
    assert turned["coming:experts-1"] > 3.8
    assert turned["coming:experts-0"] + turned["coming:experts-1"] == pytest.approx(4.0)


def test_the_autoscaler_reads_what_a_router_says() -> None:
    config = parse_args(
        {"model": {"path": "m"}, "experts": {"groups": 2, "replicas": "elastic"}, "router": {"replicas": "elastic"}}
    )
    observer = Observer(fleet_of(config))
    clock = FakeClock()
    made = reporter(clock)
    for second in range(6):
        clock.now = float(second)
        engine = replace(ENGINE, steps=10 * second, step_s=0.5 * second, waiting=5)
        dispatch = totals((300 * second, 100 * second), 200 * second)
        report = made.read(engine, dispatch, Percentiles(0.25, 0.03), unseen(5))
        observer.see("Router", {"r": report}, clock.now, 5.0)
        for index in (0, 1):
            expert = {"seq": second + 1.0, "uptime_s": clock.now, "rows": 0.0, "busy_s": 0.0, "speed_rows_per_s": 1e3}
            observer.see(f"experts-{index}", {"e": expert}, clock.now, 5.0)
    signals = observer.signals({}, "Router", SignalsSpec(), clock.now)
    assert signals.router is not None
    assert (signals.router.waiting, signals.router.ttft_p95_ms) == (5.0, 250.0)
    first, second_group = signals.groups["experts-0"], signals.groups["experts-1"]
    assert first is not None
    assert second_group is not None
    assert (first.offered_rows_per_s, second_group.offered_rows_per_s) == (300.0, 100.0)
    # Five prompts wait, 3 rows a step each for the first group, and there are ten steps a second.
    assert first.coming_rows_per_s == pytest.approx(150.0)
    assert second_group.coming_rows_per_s == pytest.approx(50.0)

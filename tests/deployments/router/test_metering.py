"""What a router publishes: every metric of its sections, of the numbers it was given. Milliseconds."""

from __future__ import annotations

from cluster import metrics
from cluster.fabric.dispatch import DispatchStats, GroupTraffic
from cluster.metrics import Metric, sections
from deployments.router.load import EngineStats
from deployments.router.metering import tell_engine, tell_fabric, tell_view
from tests.recorder import Recorder

ENGINE = EngineStats(
    running=2, waiting=1, kv_used_tokens=48, kv_tokens=1024, steps=7, tokens_generated=11, prefill_tokens=33,
    cached_tokens=16, preemptions=3, last_step_s=0.1, step_s=0.75, refused=4,
)  # fmt: skip
DISPATCH = DispatchStats(
    layers=2, scatters=14, tokens=88, resends=5, replicas={}, transport_bytes={"stream": 4096, "object_store": 0},
    groups={"experts-0": GroupTraffic(60, 0.5, 0.25), "experts-1": GroupTraffic()}, hedges=6, scatter_s=0.625,
)  # fmt: skip


def told() -> Recorder:
    recorder = Recorder()
    meter = recorder.meter
    for _ in range(2):  # totals count once
        tell_engine(meter, ENGINE)
        tell_fabric(meter, DISPATCH)
        tell_view(meter, 2.5, {"experts-0": 2, "experts-1": 0})
    return recorder


def test_every_metric_of_a_router_is_published_and_no_other() -> None:
    expected = {metric.name for section, those in sections().items() for metric in those if "Router" in section.by}
    assert told().names == expected


def test_the_engine_s_numbers_are_the_engine_s() -> None:
    recorder = told()
    expected: dict[Metric, float] = {
        metrics.PROMPT_TOKENS: 33,
        metrics.CACHED_TOKENS: 16,
        metrics.GENERATED_TOKENS: 11,
        metrics.STEPS: 7,
        metrics.STEP_S: 0.75,
        metrics.PREEMPTIONS: 3,
        metrics.REFUSED_REQUESTS: 4,
        metrics.RUNNING: 2,
        metrics.WAITING: 1,
        metrics.KV_USED_TOKENS: 48,
        metrics.KV_TOKENS: 1024,
    }
    assert {metric: recorder.of(metric) for metric in expected} == expected


def test_the_fabric_s_numbers_are_by_group_and_transport() -> None:
    recorder = told()
    assert [recorder.of(m) for m in (metrics.SCATTERS, metrics.SCATTER_S)] == [14, 0.625]
    assert [recorder.of(m) for m in (metrics.RESENT_BATCHES, metrics.HEDGED_BATCHES)] == [5, 6]
    per_group = (metrics.SENT_ROWS, metrics.WAIT_S, metrics.CRITICAL_S)
    assert [recorder.of(m, group="experts-0") for m in per_group] == [60, 0.5, 0.25]
    assert [recorder.of(m, group="experts-1") for m in per_group] == [0, 0, 0]
    assert recorder.of(metrics.TRANSPORT_BYTES, transport="stream") == 4096


def test_levels_are_told_each_time_lest_ray_forgets_them() -> None:
    recorder = told()
    assert recorder.of(metrics.VIEW_READY_REPLICAS, group="experts-1") == 0
    assert recorder.of(metrics.VIEW_AGE_S) == 2.5
    assert set(recorder.set_again.values()) == {2}

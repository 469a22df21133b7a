"""A router's report: shares cover the time since the report before, and no step means no shares."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.fabric.dispatch import DispatchStats, GroupTraffic
from deployments.router.engine import EngineStats
from deployments.router.load import LoadMeter

ENGINE = EngineStats(
    running=2, waiting=1, kv_used_tokens=48, kv_tokens=1024, steps=0, tokens_generated=0, prefill_tokens=0,
    cached_tokens=0, preemptions=0, last_step_s=0.0, step_s=0.0,
)  # fmt: skip


def dispatch(critical_s: float, rows: int) -> DispatchStats:
    return DispatchStats(
        scatters=0,
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


def test_without_a_step_there_is_no_share() -> None:
    assert LoadMeter("r").read(ENGINE, dispatch(critical_s=0.0, rows=0)).critical_share == {}

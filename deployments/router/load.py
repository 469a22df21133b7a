"""What a router reports of itself: totals, levels, and shares of an interval. Pure; knows no Serve.

`LoadMeter` makes the heartbeat the Directory gets, `LoadReporter` the numbers Serve collects for the autoscaler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.fabric.dispatch import DispatchStats
from cluster.stats import RouterStats
from deployments.router import routing, sequence
from deployments.router.latency import Percentiles

MIX_TAU_S = 60.0
"""Seconds of steps after which what the rows of a router were counts a third in its present mix."""


NOTHING_WAITED = Percentiles(None, None)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. running and waiting count sequences; the totals count from the start of the engine.

    prefill_tokens: computed tokens of prompts (recomputed ones too); cached_tokens: prompt tokens reused instead.
    step_s: seconds spent in steps; last_step_s: in the last one. refused: requests turned away by the bounds.
    """

    running: int
    waiting: int
    kv_used_tokens: int
    kv_tokens: int
    steps: int
    tokens_generated: int
    prefill_tokens: int
    cached_tokens: int
    preemptions: int
    last_step_s: float
    step_s: float
    refused: int = 0


class LoadMeter:
    """Makes `RouterStats`; each reading covers the time since the one before it."""

    def __init__(self, router_id: str) -> None:
        self._id = router_id
        self._step_s = 0.0
        self._critical_s: dict[str, float] = {}

    def read(self, engine: EngineStats, dispatch: DispatchStats, latency: Percentiles = NOTHING_WAITED) -> RouterStats:
        """The router's load now. No step since the last reading gives no critical shares at all, not zeros."""
        stepped_s = engine.step_s - self._step_s
        critical_s = {name: traffic.critical_s for name, traffic in dispatch.groups.items()}
        shares = {
            name: min(1.0, max(0.0, (total - self._critical_s.get(name, 0.0)) / stepped_s))
            for name, total in critical_s.items()
            if stepped_s > 0
        }
        self._step_s, self._critical_s = engine.step_s, critical_s
        return RouterStats(
            id=self._id,
            running=engine.running,
            waiting=engine.waiting,
            kv_used_tokens=engine.kv_used_tokens,
            transport_bytes=dispatch.transport_bytes,
            group_rows={name: traffic.rows for name, traffic in dispatch.groups.items()},
            critical_share=shares,
            tokens_generated=engine.tokens_generated,
            preemptions=engine.preemptions,
            ttft_p95_ms=_milliseconds(latency.ttft_p95_s),
            tpot_p95_ms=_milliseconds(latency.tpot_p95_s),
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


class LoadReporter:
    """Makes what Serve polls twice a second; `autoscale.observer` says what it reads of it.

    groups: in the order of the placement; none where the router holds all experts itself. clock: seconds, monotonic.
    """

    def __init__(self, groups: Sequence[str], clock: Callable[[], float]) -> None:
        self._groups = tuple(groups)
        self._clock = clock
        self._started_s = clock()
        self._reports = 0
        self._seen_rows = self._rows = np.zeros(len(self._groups))
        self._seen_tokens = self._tokens = self._seen_step_s = 0.0

    def read(
        self,
        engine: EngineStats,
        dispatch: DispatchStats,
        latency: Percentiles,
        undecoded: Iterable[sequence.Sequence],
    ) -> dict[str, float]:
        """The router now. undecoded: as of `Engine.undecoded`.

        seq, uptime_s                       the number of this report, seconds since the start
        steps, step_s, tokens               totals; tokens are generated ones
        running, waiting, kv_used_share     levels; the first two in sequences
        ttft_p95_ms, tpot_p95_ms            of late; left out where nobody waited or waits
        rows:G, wait_s:G, critical_s:G      totals of group G
        coming:G                            rows, of all MoE layers together, that every decode step will have more
                                            once those of them that there is room for are computed
        """
        self._reports += 1
        report = {
            "seq": float(self._reports),
            "uptime_s": self._clock() - self._started_s,
            "steps": float(engine.steps),
            "step_s": engine.step_s,
            "tokens": float(engine.tokens_generated),
            "running": float(engine.running),
            "waiting": float(engine.waiting),
            "kv_used_share": engine.kv_used_tokens / engine.kv_tokens,
        }
        for key, seconds in (("ttft_p95_ms", latency.ttft_p95_s), ("tpot_p95_ms", latency.tpot_p95_s)):
            if seconds is not None:
                report[key] = 1e3 * seconds
        self._follow_mix(engine, dispatch)
        # Per token and layer, times the layers. A router that has computed nothing yet knows no mix: it says 0.
        mix = self._rows * (dispatch.layers / self._tokens) if self._tokens else np.zeros(len(self._groups))
        for group, rows in zip(self._groups, routing.coming(undecoded, mix).tolist(), strict=True):
            traffic = dispatch.groups[group]
            report[f"rows:{group}"] = float(traffic.rows)
            report[f"wait_s:{group}"] = traffic.wait_s
            report[f"critical_s:{group}"] = traffic.critical_s
            report[f"coming:{group}"] = rows
        return report

    def _follow_mix(self, engine: EngineStats, dispatch: DispatchStats) -> None:
        """Rows per group and tokens (one count a layer), each fading with the time spent in steps since."""
        rows = np.array([dispatch.groups[group].rows for group in self._groups], dtype=np.float64)
        kept = math.exp(-(engine.step_s - self._seen_step_s) / MIX_TAU_S)
        self._rows = kept * self._rows + (rows - self._seen_rows)
        self._tokens = kept * self._tokens + (dispatch.tokens - self._seen_tokens)
        self._seen_rows, self._seen_tokens, self._seen_step_s = rows, float(dispatch.tokens), engine.step_s

"""What replicas would have reported, as the policy may see it: late, over a window, with holes. Pure.

Stands for `autoscale.observer`, and gives the same numbers, but for thousands of replicas at once: totals of all
routers in a ring of ticks, differences of two moments divided by the time between. Dimension: G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscale.observer import BUSY_ENOUGH

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LATENCY_WINDOW_S = 10.0
"""As in the router's `latency`: percentiles are of that long."""
LONGEST_S = 120.0


@dataclass(frozen=True)
class TickTotals:
    """What one tick added. Per group: rows[G], wait_s[G], critical_s[G], and busy_s[G], the mean of its replicas.

    capacity[G]: rows/s at its end.
    step_s: of all routers; steps: of one of them, on average. running, waiting, in_system: requests.
    coming[G]: rows one more decode step brings.
    ttft_s: of the first tokens of this tick. gap_s, gap_count: times between tokens, and how many there were of each.
    """

    rows: Floats
    wait_s: Floats
    critical_s: Floats
    busy_s: Floats
    capacity: Floats
    step_s: float
    steps: float
    running: float
    waiting: float
    in_system: float
    coming: Floats
    ttft_s: Floats
    gap_s: Floats
    gap_count: Floats


@dataclass(frozen=True)
class Seen:
    """What is known at a moment. valid[G]: False where replicas came or went too lately. Shares are NaN without steps.

    speed[G]: as measured, a share of the nominal one."""

    valid: NDArray[np.bool_]
    offered_rows_per_s: Floats
    coming_rows_per_s: Floats
    wait_share: Floats
    critical_share: Floats
    service_share: Floats
    utilization: Floats
    speed: Floats
    running: float
    waiting: float
    ttft_p95_ms: float | None
    tpot_p95_ms: float | None


class Measures:
    """The last minutes. One `record` per tick; `seen` at any moment after."""

    def __init__(self, groups: int, tick_s: float, delivery_s: float, settle_s: float, report_s: float) -> None:
        self._tick_s = tick_s
        self._delay = max(1, round(delivery_s / tick_s))
        self._settle = max(1, round(settle_s / tick_s))
        self._apart = max(1, round(report_s / tick_s))
        self._size = int(LONGEST_S / tick_s) + self._delay + 2
        self._groups = groups
        # Running totals: rows, wait, critical, busy, then the scalars step_s, steps, running, waiting, in_system.
        self._sums = np.zeros((self._size, 4 * groups + 5))
        self._coming = np.zeros((self._size, groups))
        self._changed = np.full(groups, -(10**9))
        self._capacity = np.zeros(groups)
        self._latency: list[tuple[Floats, Floats, Floats]] = [(np.empty(0),) * 3] * self._size
        self._now = 0

    def record(self, tick: TickTotals) -> None:
        """The totals of the tick that has just ended."""
        previous = self._sums[self._now % self._size]
        self._now += 1
        place = self._now % self._size
        scalars = (tick.step_s, tick.steps, tick.running, tick.waiting, tick.in_system)
        self._sums[place] = previous
        self._sums[place] += np.concatenate([tick.rows, tick.wait_s, tick.critical_s, tick.busy_s, scalars])
        self._coming[place] = tick.coming
        self._changed[tick.capacity != self._capacity] = self._now
        self._capacity = tick.capacity
        self._latency[place] = (tick.ttft_s, tick.gap_s, tick.gap_count)

    def ongoing(self, window_s: float) -> tuple[float, Floats] | None:
        """What Serve counts, on average over the last `window_s`: (requests in the system, calls in flight[G])."""
        last = self._now - self._delay
        if last < self._apart:
            return None
        since = max(0, last - min(round(window_s / self._tick_s), self._size - self._delay - 2))
        ticks = max(1, last - since)
        risen = (self._sums[last % self._size] - self._sums[since % self._size]) / ticks
        groups = self._groups
        return float(risen[-1]), risen[groups : 2 * groups] / self._tick_s

    def seen(self, window_s: float) -> Seen | None:
        """What had arrived by now, over the last `window_s`. None before there is anything."""
        last = self._now - self._delay
        if last < self._apart:
            return None
        groups = self._groups
        window = min(round(window_s / self._tick_s), self._size - self._delay - 2)
        since = np.maximum(max(last - window, 0), self._changed + self._settle)
        valid = last - since >= self._apart
        since = np.where(valid, since, last - self._apart)
        newest = self._sums[last % self._size]
        oldest = self._sums[since % self._size]
        place = np.arange(groups)
        elapsed = (last - since) * self._tick_s
        rows, wait, critical, busy = (newest[k * groups + place] - oldest[place, k * groups + place] for k in range(4))
        step_s, steps = (newest[4 * groups + k] - oldest[:, 4 * groups + k] for k in range(2))
        levels = newest[4 * groups + 2 :] - self._sums[max(last - window, 0) % self._size, 4 * groups + 2 :]
        running, waiting, _ = (levels / max(1, last - max(last - window, 0))).tolist()
        # As the observer: a step that lasts says nothing of the groups.
        valid &= bool((steps >= 0.5).all()) or running <= 0
        with np.errstate(divide="ignore", invalid="ignore"):
            utilization = np.minimum(1.0, busy / elapsed)
            # As the observer: rows per busy second once that tells more than the warm-up.
            speed = np.where(utilization >= BUSY_ENOUGH, rows / (busy * self._capacity), 1.0)
            none = np.where(step_s > 0, 1.0, np.nan)
            ttft, tpot = self._percentiles(last)
            return Seen(
                valid=valid,
                offered_rows_per_s=rows / elapsed,
                coming_rows_per_s=self._coming[last % self._size] * steps / elapsed,
                wait_share=none * wait / step_s,
                critical_share=none * critical / step_s,
                service_share=none * busy / step_s,
                utilization=utilization,
                speed=speed,
                running=running,
                waiting=waiting,
                ttft_p95_ms=ttft,
                tpot_p95_ms=tpot,
            )

    def _percentiles(self, last: int) -> tuple[float | None, float | None]:
        first = max(1, last - round(LATENCY_WINDOW_S / self._tick_s))
        kept = [self._latency[tick % self._size] for tick in range(first, last + 1)]
        ttft = np.concatenate([entry[0] for entry in kept])
        gaps = np.concatenate([entry[1] for entry in kept])
        counts = np.concatenate([entry[2] for entry in kept])
        return _p95(ttft, np.ones(len(ttft))), _p95(gaps, counts)


def _p95(seconds: Floats, counts: Floats) -> float | None:
    """In milliseconds: the least value that at least 95 % of all do not exceed; None where there is none."""
    if not counts.sum() > 0:
        return None
    order = np.argsort(seconds)
    upto = np.cumsum(counts[order])
    return 1e3 * float(seconds[order][np.searchsorted(upto, 0.95 * upto[-1] - 1e-9)])

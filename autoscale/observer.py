"""Reports of replicas, as Serve delivers them, to the signals of a decision: rates over a window, with an age. Pure.

A report is a flat dict of numbers with a sequence number `seq` and the sender's own `uptime_s`: totals are divided by
the sender's time, the age is counted by the reader's clock from the moment a new sequence number was seen. Serve keeps
delivering the last report of a replica that has fallen silent; here it grows old.

    routers   seq, uptime_s, steps, step_s, tokens, running, waiting, kv_used_share, ttft_p95_ms?, tpot_p95_ms?,
              and per group rows:G, wait_s:G, critical_s:G (totals), coming:G (rows one decode step more will bring)
    replicas  seq, uptime_s, rows, busy_s (totals), queue_rows, speed_rows_per_s (as measured at warm-up)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoscale.signals import Fleet, GroupLoad, RouterLoad, Signals, UnitCounts
from autoscale.spec import SignalsSpec

BUSY_ENOUGH = 0.05
"""Busy share of a window from which rows per busy second say more of a replica's speed than its warm-up."""
MAX_REPORTS = 256
SETTLE_S = 1.0
"""How long after a change of replicas reports may still speak of the time before it: delivery, and one router step."""

Report = Mapping[str, float]


@dataclass(frozen=True)
class _Seen:
    """A report and when it was first seen."""

    at: float
    report: Report


class Observer:
    """The last reports of every replica. Forgets replicas that are not listed as running any more.

    All times are of one clock, which may jump back: what lies in its future then is forgotten.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._reports: dict[str, dict[str, deque[_Seen]]] = {}
        self._settled_at: dict[str, float] = {}
        self._listed_at: dict[str, dict[str, float]] = {}

    def see(self, unit: str, reports: Mapping[str, Report], now: float, window_s: float) -> None:
        """The newest report of each running replica of `unit`; {} for one that has not reported yet."""
        known = self._reports.setdefault(unit, {})
        if known.keys() != reports.keys() or self._settled_at.get(unit, now) > now + SETTLE_S:
            self._settled_at[unit] = now + SETTLE_S
        for gone in known.keys() - reports.keys():
            del known[gone]
        listed = self._listed_at.get(unit, {})
        self._listed_at[unit] = {replica: min(now, listed.get(replica, now)) for replica in reports}
        for replica, report in reports.items():
            seen = known.setdefault(replica, deque(maxlen=MAX_REPORTS))
            while seen and seen[-1].at > now:
                seen.pop()
            if _finite(report, "seq") is not None and (not seen or seen[-1].report["seq"] != report["seq"]):
                seen.append(_Seen(now, report))
            # One report from before the window stays: the window's first difference starts there.
            while len(seen) > 1 and seen[1].at <= now - window_s:
                seen.popleft()

    def signals(self, counts: Mapping[str, UnitCounts], routers: str, spec: SignalsSpec, now: float) -> Signals:
        """What is known at `now`. routers: the unit of the routers, whether or not their number is scaled."""
        valid = self._windows(routers, spec, now, float("-inf"))
        return Signals(
            counts=counts,
            groups={group: self._group(group, routers, spec, now) for group in self._fleet.groups},
            router=_router_load(valid) if valid else None,
        )

    def ages(self, routers: str, now: float) -> dict[str, float]:
        """Group, or the unit `routers` -> seconds since the oldest of its replicas' last reports was new.

        A replica that has not reported yet is as old as its listing. A part without running replicas is left out.
        """
        parts = {group: [unit.name for unit in self._fleet.of(group)] for group in self._fleet.groups}
        ages = {}
        for part, units in {**parts, routers: [routers]}.items():
            heard = [self._heard_at(unit, replica) for unit in units for replica in self._reports.get(unit, {})]
            if heard:
                ages[part] = max(0.0, now - min(heard))
        return ages

    def _heard_at(self, unit: str, replica: str) -> float:
        seen = self._reports[unit][replica]
        return seen[-1].at if seen else self._listed_at[unit][replica]

    def _windows(self, unit: str, spec: SignalsSpec, now: float, since: float) -> list[_Window] | None:
        """One window per replica, of what was seen from `since` on; None where one of them is silent or new."""
        windows = []
        for seen in self._reports.get(unit, {}).values():
            window = _Window.over([each for each in seen if each.at >= since], spec, now)
            if window is None:
                return None
            windows.append(window)
        return windows

    def _group(self, group: str, router_unit: str, spec: SignalsSpec, now: float) -> GroupLoad | None:
        """None where a router, or a replica of the group, is silent or new, or replicas have just come or gone.

        Shares belong to a number of replicas: those of the time before a change would be read as those of today's.
        """
        units = self._fleet.of(group)
        since = max((self._settled_at.get(unit.name, float("-inf")) for unit in units), default=now)
        routers = self._windows(router_unit, spec, now, since)
        pools = {unit.pool: self._windows(unit.name, spec, now, since) for unit in units}
        replicas = [window for valid in pools.values() for window in valid or ()]
        if not routers or not replicas or any(valid is None for valid in pools.values()):
            return None
        if any(router.last("running") > 0 and not router.rise("steps") for router in routers):
            return None  # a step that lasts: it may be waiting for a group that is gone, and says nothing of the others
        rows, steps = _sum(routers, f"rows:{group}"), _sum_rates(routers, "steps")
        step_s = _sum(routers, "step_s")
        offered = _sum_rates(routers, f"rows:{group}")
        if rows is None or offered is None or step_s is None or steps is None:
            return None
        speeds = {pool: _mean([_speed(window) for window in valid or ()]) for pool, valid in pools.items() if valid}
        total_speed = sum(_speed(window) for window in replicas)
        shares: dict[str, float | None] = {}
        if step_s > 0:
            wait, critical = _sum(routers, f"wait_s:{group}"), _sum(routers, f"critical_s:{group}")
            shares = {
                "wait_share": None if wait is None else wait / step_s,
                "critical_share": None if critical is None else critical / step_s,
                "service_share": rows / total_speed / step_s if total_speed > 0 else None,
            }
        return GroupLoad(
            offered_rows_per_s=offered,
            coming_rows_per_s=sum(window.last(f"coming:{group}") * window.rate("steps") for window in routers),
            speed_rows_per_s=speeds,
            utilization=min(1.0, _mean([window.rate("busy_s") for window in replicas])),
            queue_rows=sum(window.last("queue_rows") for window in replicas),
            **shares,
        )


@dataclass(frozen=True)
class _Window:
    """The reports of one replica over the last window, oldest first, at least two."""

    reports: Sequence[Report]

    @classmethod
    def over(cls, listed: Sequence[_Seen], spec: SignalsSpec, now: float) -> _Window | None:
        """None where the newest report is too old, or there is nothing to take a difference from."""
        if len(listed) < 2 or not 0 <= now - listed[-1].at <= spec.max_age_s:
            return None
        window = cls([each.report for each in listed])
        return window if window._elapsed_s > 0 else None

    @property
    def _elapsed_s(self) -> float:
        return self.reports[-1].get("uptime_s", 0.0) - self.reports[0].get("uptime_s", 0.0)

    def rise(self, key: str) -> float | None:
        """How much a total rose; None where it is missing or no number."""
        first, last = _finite(self.reports[0], key), _finite(self.reports[-1], key)
        return None if first is None or last is None else max(0.0, last - first)

    def rate(self, key: str) -> float:
        """How much a total rose per second of the sender; 0 where it is missing."""
        return (self.rise(key) or 0.0) / self._elapsed_s

    def last(self, key: str) -> float:
        """A level now; 0 where it is missing."""
        return _finite(self.reports[-1], key) or 0.0

    def mean(self, key: str) -> float:
        """A level over the window."""
        return _mean([_finite(report, key) or 0.0 for report in self.reports])


def _router_load(routers: Sequence[_Window]) -> RouterLoad:
    return RouterLoad(
        running=sum(window.mean("running") for window in routers),
        waiting=sum(window.mean("waiting") for window in routers),
        kv_used_share=max(window.last("kv_used_share") for window in routers),
        ttft_p95_ms=_worst(routers, "ttft_p95_ms"),
        tpot_p95_ms=_worst(routers, "tpot_p95_ms"),
    )


def _worst(windows: Sequence[_Window], key: str) -> float | None:
    """The largest latest value; None where no window has one. A percentile of all would need the samples themselves."""
    found = [value for window in windows if (value := _finite(window.reports[-1], key)) is not None]
    return max(found, default=None)


def _speed(replica: _Window) -> float:
    """Rows per busy second where it was busy enough to tell, else as it was measured at warm-up."""
    rows, busy_s = replica.rise("rows"), replica.rise("busy_s")
    if rows and busy_s and replica.rate("busy_s") >= BUSY_ENOUGH:
        return rows / busy_s
    return replica.last("speed_rows_per_s")


def _sum(windows: Sequence[_Window], key: str) -> float | None:
    rises = [window.rise(key) for window in windows]
    known = [rise for rise in rises if rise is not None]
    return sum(known) if len(known) == len(rises) else None


def _sum_rates(windows: Sequence[_Window], key: str) -> float | None:
    return None if _sum(windows, key) is None else sum(window.rate(key) for window in windows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _finite(report: Report, key: str) -> float | None:
    value = report.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

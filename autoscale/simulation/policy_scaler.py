"""The very same `decide` as in Serve, on the signals of the simulated cluster. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from autoscale.policy import PolicyState, decide
from autoscale.schedule import Schedule
from autoscale.signals import Fleet, GroupLoad, RouterLoad, Signals, UnitCounts, UnitFacts
from autoscale.simulation.machines import Machines, Unit
from autoscale.simulation.measures import Measures, Seen
from autoscale.spec import PolicySpec

DAY_ZERO = datetime(2026, 1, 5, tzinfo=UTC)
"""When a run begins, for schedules: a Monday at midnight."""


class PolicyScaler:
    """A policy file, through `decide`, on the signals of the simulated cluster."""

    needs_groups = True

    def __init__(self, spec: PolicySpec, units: Sequence[Unit], max_replicas_hard: int) -> None:
        facts = {
            unit.name: UnitFacts(
                name=unit.name,
                group=None if unit.group is None else f"experts-{unit.group}",
                pool=unit.pool,
                gpus=float(unit.devices),
                speed_rows_per_s=unit.speed_rows_per_s or None,
            )
            for unit in units
        }
        self._fleet = Fleet(facts, max_replicas_hard)
        self._spec = spec
        self._schedule = Schedule(spec)
        self._units = {unit.name: index for index, unit in enumerate(units)}
        self._speeds: dict[int, list[tuple[int, str, float]]] = {}
        for index, unit in enumerate(units):
            if unit.group is not None:
                self._speeds.setdefault(unit.group, []).append((index, unit.pool, unit.speed_rows_per_s))
        self._state = PolicyState()
        self.reasons: list[str] = []

    def targets(self, measures: Measures, machines: Machines, now: float) -> Mapping[int, int]:
        """One decision."""
        counts = {
            name: UnitCounts(ready, target, leaving)
            for name, ready, target, leaving in zip(
                self._units,
                machines.ready.tolist(),
                machines.target.tolist(),
                machines.leaving.tolist(),
                strict=True,
            )
        }
        seen = measures.seen(self._spec.signals.window_s)
        signals = signals_of(seen, counts, self._speeds, machines)
        spec = self._schedule.in_force(DAY_ZERO + timedelta(seconds=now))
        decision = decide(signals, spec, self._fleet, self._state, now)
        self._state = decision.state
        self.reasons += [f"{now:.1f} s: {change.reason}" for change in decision.changes]
        return {self._units[name]: target for name, target in decision.targets.items()}


def signals_of(
    seen: Seen | None,
    counts: Mapping[str, UnitCounts],
    speeds: Mapping[int, Sequence[tuple[int, str, float]]],
    machines: Machines,
) -> Signals:
    """Arrays to the words of a decision. speeds: group -> (unit, pool, rows/s) of each unit it has."""
    if seen is None:
        return Signals(counts, {f"experts-{group}": None for group in speeds}, None)
    columns = zip(
        seen.valid.tolist(),
        seen.offered_rows_per_s.tolist(),
        seen.coming_rows_per_s.tolist(),
        seen.wait_share.tolist(),
        seen.critical_share.tolist(),
        seen.service_share.tolist(),
        seen.utilization.tolist(),
        seen.speed.tolist(),
        strict=True,
    )
    groups: dict[str, GroupLoad | None] = {}
    ready = machines.ready
    for group, (valid, offered, coming, wait, critical, service, utilization, as_measured) in enumerate(columns):
        measured = {pool: speed * as_measured for unit, pool, speed in speeds[group] if ready[unit] > 0}
        groups[f"experts-{group}"] = (
            GroupLoad(
                offered_rows_per_s=offered,
                wait_share=_known(wait),
                critical_share=_known(critical),
                service_share=_known(service),
                coming_rows_per_s=coming,
                speed_rows_per_s=measured,
                utilization=utilization,
            )
            if valid and measured
            else None
        )
    router = RouterLoad(seen.running, seen.waiting, ttft_p95_ms=seen.ttft_p95_ms, tpot_p95_ms=seen.tpot_p95_ms)
    return Signals(counts, groups, router)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

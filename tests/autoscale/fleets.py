"""Small fleets, and one that answers to its own scaling: routers in lock step, for tests of `decide`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoscale.policy import Decision, PolicyState, decide
from autoscale.signals import ROUTER, Change, Fleet, GroupLoad, RouterLoad, Signals, UnitCounts, UnitFacts
from autoscale.spec import PolicySpec
from cluster.config import HOME_POOL, deployment_name

SPEED = 1000.0


def group_fleet(
    groups: int,
    pools: Sequence[str] = (HOME_POOL,),
    *,
    speed: float | None = SPEED,
    routers: bool = False,
    hard: int = 8,
) -> Fleet:
    """Groups `experts-0`... in each of the pools; a replica takes a GPU, a router a CPU."""
    units = [
        UnitFacts(deployment_name(f"experts-{g}", pool), f"experts-{g}", pool, gpus=1.0, speed_rows_per_s=speed)
        for g in range(groups)
        for pool in pools
    ]
    if routers:
        units.append(UnitFacts(ROUTER, None, cpus=1.0))
    return Fleet({unit.name: unit for unit in units}, hard)


def at(ready: int, target: int | None = None, leaving: int = 0) -> UnitCounts:
    return UnitCounts(ready, ready if target is None else target, leaving)


@dataclass
class Ticks:
    """Calls `decide` again and again; the clock and the state go on, counts are the test's own."""

    fleet: Fleet
    spec: PolicySpec
    state: PolicyState = field(default_factory=PolicyState)
    now: float = 1000.0

    def tick(
        self,
        counts: Mapping[str, UnitCounts],
        loads: Mapping[str, GroupLoad | None],
        router: RouterLoad | None = None,
        *,
        later_s: float = 0.0,
    ) -> Decision:
        self.now += later_s
        decision = decide(Signals(counts, loads, router), self.spec, self.fleet, self.state, self.now)
        self.state = decision.state
        return decision


class ClosedLoop:
    """Groups in lock step: T = base + max over groups of (hop + rows / (replicas x speed)), `rows` a step's own.

    Offered rows are rows / T, so that they rise when the step gets shorter. noise: of every signal, uniform, in each
    tick anew. A group whose ready replicas changed has no load for `settle_s`, as `observer` has it.
    """

    TICK_S, START_S, SETTLE_S = 0.2, 5.0, 2.0
    BASE_S, HOP_S = 0.02, 0.002

    def __init__(self, groups: int, spec: PolicySpec, *, noise: float = 0.0, seed: int = 0, hard: int = 8) -> None:
        self.names = [f"experts-{g}" for g in range(groups)]
        self._ticks = Ticks(group_fleet(groups, hard=hard), spec)
        self._noise, self._random = noise, random.Random(seed)
        self.ready = dict.fromkeys(self.names, 1)
        self.target = dict.fromkeys(self.names, 1)
        self._starts: list[tuple[float, str]] = []
        self._changed_at = dict.fromkeys(self.names, float("-inf"))

    def run(self, rows: Sequence[float], seconds: float) -> list[tuple[float, Change]]:
        """Steady load for so long -> (second, change)."""
        begin, changes = self._ticks.now, []
        while self._ticks.now < begin + seconds:
            counts = {name: UnitCounts(self.ready[name], self.target[name]) for name in self.names}
            decision = self._ticks.tick(counts, self._loads(rows), later_s=self.TICK_S)
            changes += [(self._ticks.now - begin, change) for change in decision.changes]
            self._apply(decision)
        return changes

    def step_s(self, rows: Sequence[float]) -> float:
        """The step time with the replicas that are ready."""
        return self.BASE_S + max(self._waits(rows))

    def _waits(self, rows: Sequence[float]) -> list[float]:
        return [self.HOP_S + r / (SPEED * self.ready[name]) for r, name in zip(rows, self.names, strict=True)]

    def _loads(self, rows: Sequence[float]) -> dict[str, GroupLoad | None]:
        waits, step_s = self._waits(rows), self.step_s(rows)
        loads: dict[str, GroupLoad | None] = {}
        for index, name in enumerate(self.names):
            others = max((wait for other, wait in enumerate(waits) if other != index), default=0.0)
            loads[name] = None
            if self._ticks.now - self._changed_at[name] >= self.SETTLE_S:
                loads[name] = GroupLoad(
                    offered_rows_per_s=self._noisy(rows[index] / step_s),
                    wait_share=self._noisy(waits[index] / step_s),
                    critical_share=self._noisy(max(0.0, waits[index] - others) / step_s),
                    service_share=self._noisy((waits[index] - self.HOP_S) / step_s),
                    speed_rows_per_s={HOME_POOL: SPEED},
                    utilization=min(1.0, rows[index] / step_s / SPEED / self.ready[name]),
                )
        return loads

    def _apply(self, decision: Decision) -> None:
        now = self._ticks.now
        for change in decision.changes:
            self.target[change.unit] = change.after
            self._starts += [(now + self.START_S, change.unit)] * (change.after - change.before)
            if self.ready[change.unit] > change.after:
                self.ready[change.unit], self._changed_at[change.unit] = change.after, now
        for entry in [entry for entry in self._starts if entry[0] <= now]:
            self._starts.remove(entry)
            if self.ready[entry[1]] < self.target[entry[1]]:
                self.ready[entry[1]] += 1
                self._changed_at[entry[1]] = now

    def _noisy(self, value: float) -> float:
        return value * (1 + self._random.uniform(-self._noise, self._noise))

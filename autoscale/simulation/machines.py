"""Replicas and the devices they hold: starting, ready, leaving, dying. Pure; knows no load and no policy.

    target raised ──start time──> ready ──target lowered──> leaving ──drain──> gone
                                    └── dies ──> another one starts at once, on another device

A replica holds its devices from the moment it is asked for until it is gone. U units, in the order they were given.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """Interchangeable replicas. devices: that one holds. cost: of a device for an hour. group: index, None: engines."""

    name: str
    group: int | None
    pool: str
    devices: int
    cost: float
    speed_rows_per_s: float = 0.0


@dataclass(frozen=True)
class Lives:
    """start_s, start_sigma: a start takes start_s * exp(sigma * normal). drain_s: a replica taken back holds on.

    mtbf_s: mean time between failures of one device; a replica dies with any of its devices. None: nothing fails.
    """

    start_s: float
    start_sigma: float
    drain_s: float
    mtbf_s: float | None


class Machines:
    """All replicas. Invariant: ready + starting = target, for every unit."""

    def __init__(self, units: Sequence[Unit], lives: Lives, initial: Sequence[int], seed: int) -> None:
        self.units = tuple(units)
        self.ready: Ints = np.array(initial, dtype=np.int64)
        self.target: Ints = self.ready.copy()
        self.leaving: Ints = np.zeros(len(units), dtype=np.int64)
        self.changes = self.deaths = 0
        self.device_s = self.cost_s = 0.0
        self._devices = np.array([unit.devices for unit in units], dtype=np.float64)
        self._cost = self._devices * [unit.cost for unit in units]
        self._lives = lives
        self._rng = np.random.default_rng([seed, 4])
        # Both ascending. A start is known by its moment: cancelled are the ones that would be ready last.
        self._starting: dict[int, list[float]] = {}
        self._gone: list[tuple[float, int]] = []
        self._next_ready_s = math.inf

    @property
    def held(self) -> Ints:
        """[U]: replicas that hold their devices now."""
        return self.target + self.leaving

    @property
    def devices(self) -> float:
        """Devices held now."""
        return float(self.held @ self._devices)

    def ask(self, unit: int, replicas: int, now: float) -> None:
        """Set a unit's target: starts what is missing; takes back those that start first, then ready ones."""
        more = replicas - int(self.target[unit])
        if not more:
            return
        self.changes += 1
        self.target[unit] = replicas
        if more > 0:
            for _ in range(more):
                self._start(unit, now)
            return
        starting = self._starting.get(unit, [])
        cancelled = min(len(starting), -more)
        del starting[len(starting) - cancelled :]
        self._forget_empty(unit)
        self._leave(unit, -more - cancelled, now)

    def _leave(self, unit: int, replicas: int, now: float) -> None:
        self.ready[unit] -= replicas
        self.leaving[unit] += replicas
        self._gone += [(now + self._lives.drain_s, unit)] * replicas

    def _start(self, unit: int, now: float) -> None:
        took_s = self._lives.start_s * math.exp(self._lives.start_sigma * self._rng.standard_normal())
        insort(self._starting.setdefault(unit, []), now + took_s)
        self._next_ready_s = min(self._next_ready_s, now + took_s)

    def _forget_empty(self, unit: int) -> None:
        if not self._starting.get(unit):
            self._starting.pop(unit, None)
        self._next_ready_s = min((times[0] for times in self._starting.values()), default=math.inf)

    def pass_time(self, now: float, tick_s: float) -> list[int]:
        """What became ready, left or died by `now`, the end of a tick that is charged here; returns what died."""
        held = self.held
        self.device_s += float(held @ self._devices) * tick_s
        self.cost_s += float(held @ self._cost) * tick_s
        while self._next_ready_s <= now:
            for unit in [unit for unit, times in self._starting.items() if times[0] <= now]:
                self._starting[unit].pop(0)
                self.ready[unit] += 1
                self._forget_empty(unit)
        while self._gone and self._gone[0][0] <= now:
            self.leaving[self._gone.pop(0)[1]] -= 1
        return self._die(now, tick_s) if self._lives.mtbf_s is not None else []

    def _die(self, now: float, tick_s: float) -> list[int]:
        assert self._lives.mtbf_s is not None
        at_risk = self.ready * self._devices
        deaths = int(self._rng.poisson(float(at_risk.sum()) * tick_s / self._lives.mtbf_s))
        lost = []
        for _ in range(deaths):
            at_risk = self.ready * self._devices
            if at_risk.sum() > 0:
                unit = int(self._rng.choice(len(at_risk), p=at_risk / at_risk.sum()))
                self.ready[unit] -= 1
                self.deaths += 1
                self._start(unit, now)
                lost.append(unit)
        return lost

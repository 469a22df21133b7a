"""One run: a trace through engines and groups, tick by tick, while a scaler asks for replicas. Pure.

each tick: arrivals ──> step times ──> prompts computed, tokens decoded ──> measures ──> replicas come, go, die
every control_s: measures ──> scaler ──> targets
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoscale.simulation.machines import Machines, Unit
from autoscale.simulation.measures import Measures, TickTotals
from autoscale.simulation.requests import Requests
from autoscale.simulation.steps import Layout, Moment, StepModel, Steps
from autoscale.simulation.world import World

Floats = NDArray[np.float64]

KEPT_POINTS = 600
LOOK_EVERY = 240
LEAST_CAPACITY = 1e-6
"""Rows/s of a group without a replica: steps stall for as long as that lasts, and no number becomes infinite."""


@dataclass(frozen=True)
class Limit:
    """When a run may be given up: it costs as much as `cost` already, or can keep no more than `kept` any longer."""

    cost: float
    kept: float


class Scaler(Protocol):
    """What decides."""

    @property
    def needs_groups(self) -> bool:
        """Whether it looks at groups: measures of them are kept only then."""

    @property
    def reasons(self) -> Sequence[str]:
        """One sentence per change, where it has any."""

    def targets(self, measures: Measures, machines: Machines, now: float) -> Mapping[int, int]:
        """Unit index -> replicas; a unit that is left out keeps what it has."""


@dataclass(frozen=True)
class Result:
    """One run. Per request, in seconds: queue_s, ttft_s, tpot_s (NaN for a single token), infinite where unfinished.

    at_s, devices, counts[unit][i]: over time, replicas held. done, requests: how many ended, and came.
    """

    name: str
    parameters: Mapping[str, float | int | str]
    queue_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    kept: float
    device_hours: float
    cost: float
    changes: int
    deaths: int
    done: int
    at_s: Floats
    devices: Floats
    counts: Mapping[str, Floats]
    reasons: Sequence[str] = ()
    wall_s: float = 0.0

    @property
    def requests(self) -> int:
        """How many came."""
        return len(self.ttft_s)


@dataclass
class Replay:
    """The state of one run. `requests`, `machines` and `measures` may be looked at after it."""

    world: World
    layout: Layout
    units: Sequence[Unit]
    initial: Sequence[int]
    scaler: Scaler
    engine_unit: int = field(init=False)

    def __post_init__(self) -> None:
        world, layout = self.world, self.layout
        constants = world.constants
        self.engine_unit = next(i for i, unit in enumerate(self.units) if unit.group is None)
        self.requests = Requests(world.trace, world.domain, len(world.loads))
        self.machines = Machines(self.units, world.lives(), self.initial, world.seed)
        groups = layout.shares.shape[2] if self.scaler.needs_groups else 0
        self.measures = Measures(
            groups, world.scenario.tick_s, constants["delivery_s"], constants["settle_s"], constants["report_s"]
        )
        self._model = StepModel(layout)
        self._mean_shares = layout.shares.mean(axis=1)
        self._speeds = np.array([unit.speed_rows_per_s for unit in self.units])
        self._group_of = np.array([-1 if unit.group is None else unit.group for unit in self.units])
        domains = len(world.loads)
        self._phase_share = np.full(domains + 1, 1.0)
        self._active = 1.0
        self._own = min(1.0, float(world.trace.prompt_tokens.mean()) / layout.max_batch_tokens)
        self._capacity = self._capacities()

    def run(self, name: str, parameters: Mapping[str, float | int | str], limit: Limit | None = None) -> Result | None:
        """Replay the whole trace; None where it was given up."""
        began = time.perf_counter()
        tick_s = self.world.scenario.tick_s
        every = max(1, round(self.world.scenario.control_s / tick_s))
        keep = max(1, self.world.ticks // KEPT_POINTS)
        kept: list[tuple[float, Floats]] = []
        for tick in range(self.world.ticks):
            now = tick * tick_s
            if tick % LOOK_EVERY == 0 and limit is not None and self._hopeless(limit):
                return None
            if tick % keep == 0:
                kept.append((now, self.machines.held.astype(np.float64)))
            self._tick(now, tick_s)
            if (tick + 1) % every == 0:
                for unit, target in self.scaler.targets(self.measures, self.machines, now + tick_s).items():
                    self.machines.ask(unit, target, now + tick_s)
                self._capacity = self._capacities()
        return self._result(name, parameters, kept, time.perf_counter() - began)

    def _hopeless(self, limit: Limit) -> bool:
        """Dearer than the limit, or too many first tokens late already."""
        if self.machines.cost_s / 3600 >= limit.cost:
            return True
        requests, trace = self.requests, self.world.trace
        computed = slice(0, requests.computed)
        late_s = self.world.scenario.slo.ttft_ms / 1e3
        late = int((requests.first_s[computed] - trace.arrival_s[computed] > late_s).sum())
        return late > (1 - limit.kept) * len(trace)

    def _capacities(self) -> Floats:
        """[G]: rows/s of each group, or of each device of a whole-model replica."""
        groups = self.layout.shares.shape[2]
        if not self.layout.shared:
            return np.full(groups, self._speeds[self.engine_unit])
        experts = self._group_of >= 0
        total = np.bincount(self._group_of[experts], (self.machines.ready * self._speeds)[experts], minlength=groups)
        return np.maximum(total, LEAST_CAPACITY)

    def _tick(self, now: float, tick_s: float) -> None:
        requests, machines = self.requests, self.machines
        engines = int(machines.ready[self.engine_unit])
        requests.arrive(now + tick_s)
        decoding = requests.decoding
        total = int(decoding.sum())
        decode_mix = decoding / max(total, 1)
        prompt_mix = requests.queue_mix(4.0 * max(engines, 1) * self.layout.max_batch_tokens)
        moment = Moment(
            max(engines, 1), self._capacity, total, decode_mix, prompt_mix, self._phase_share, self._active, self._own
        )
        steps = self._model.at(moment)
        prompt_step_s, decode_step_s = float(prompt_mix @ steps.step_s[:-1]), float(steps.step_s[-1])
        came_first = requests.computed
        served = requests.compute(
            now,
            tick_s,
            steps.step_s[:-1] / steps.chunk_tokens,
            engines,
            engines * self.layout.max_sequences,
            (1 / prompt_step_s, 1 / decode_step_s),
        )
        busy = min(1.0, requests.busy_s / tick_s)
        clock_steps = tick_s * (busy / prompt_step_s + (1 - busy) / decode_step_s) if engines else 0.0
        self._follow_phases(served, steps, busy, engines, total, tick_s, prompt_mix)
        requests.decode(now + tick_s, clock_steps)
        self._record(served + decoding * clock_steps, steps, tick_s, engines, total, came_first)
        lost = machines.pass_time(now + tick_s, tick_s)
        for unit in lost:
            if unit == self.engine_unit:
                requests.redo(1 / max(engines, 1))
        self._capacity = self._capacities()

    def _follow_phases(
        self,
        served: Floats,
        steps: Steps,
        busy: float,
        engines: int,
        decoding: int,
        tick_s: float,
        prompt_mix: Floats,
    ) -> None:
        """Which steps the engines spent this tick in, and how many of them ran at all."""
        share = np.zeros(len(served) + 1)
        share[:-1] = served * steps.step_s[:-1] / (steps.chunk_tokens * tick_s)
        share[:-1] += max(0.0, busy * engines - share.sum()) * prompt_mix
        share[-1] = (1 - busy) * min(engines, decoding)
        self._active = float(share.sum())
        # An idle cluster keeps the mix it had: the next prompt meets nobody.
        if self._active > 0:
            self._phase_share = share

    def _record(
        self,
        tokens: Floats,
        steps: Steps,
        tick_s: float,
        engines: int,
        decoding: int,
        came_first: int,
    ) -> None:
        requests, layout = self.requests, self.layout
        in_system = requests.arrived - requests.done
        running = min(in_system, engines * layout.max_sequences)
        none = np.zeros(0)
        rows = coming = wait_s = critical_s = busy_s = capacity = none
        first, steps_each = none, 0.0
        if self.scaler.needs_groups:
            per_token = layout.top_k * layout.layers
            rows = tokens @ self._mean_shares * per_token
            coming = requests.undecoded_mix(engines * layout.max_sequences) @ self._mean_shares * per_token
            engine_steps = self._phase_share * (tick_s / steps.step_s) if self._active > 0 else 0 * steps.step_s
            steps_each = float(engine_steps.sum()) / max(engines, 1)
            layers = engine_steps * self._model.layers_per_pattern
            wait_s, critical_s = waits(steps.wait_s, layers, layout.hop_s)
            busy_s = np.einsum("k,kpg->g", layers, steps.alone_s)
            capacity = self._capacity
            first = (
                requests.first_s[came_first : requests.computed]
                - self.world.trace.arrival_s[came_first : requests.computed]
            )
        self.measures.record(
            TickTotals(
                rows=rows,
                wait_s=wait_s,
                critical_s=critical_s,
                busy_s=busy_s,
                capacity=capacity,
                step_s=self._active * tick_s,
                steps=steps_each,
                running=running,
                waiting=in_system - running,
                in_system=in_system,
                coming=coming,
                ttft_s=first,
                gap_s=steps.step_s,
                gap_count=self._phase_share / steps.step_s * decoding,
            )
        )

    def _result(
        self,
        name: str,
        parameters: Mapping[str, float | int | str],
        kept: Sequence[tuple[float, Floats]],
        wall_s: float,
    ) -> Result:
        requests, trace, slo = self.requests, self.world.trace, self.world.scenario.slo
        queue_s = np.nan_to_num(requests.start_s - trace.arrival_s, nan=np.inf)
        ttft_s = np.nan_to_num(requests.first_s - trace.arrival_s, nan=np.inf)
        finish = requests.finish_s()
        tpot_s = np.full(len(trace), np.inf)
        ended = np.isfinite(finish)
        with np.errstate(divide="ignore", invalid="ignore"):
            tpot_s[ended] = (finish - requests.first_s)[ended] / (trace.generated_tokens[ended] - 1)
        single = ended & (trace.generated_tokens == 1)
        tpot_s[single] = np.nan
        good = (ttft_s <= slo.ttft_ms / 1e3) & (single | (tpot_s <= slo.tpot_ms / 1e3))
        held = np.array([counts for _, counts in kept])
        return Result(
            name=name,
            parameters=dict(parameters),
            queue_s=queue_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            kept=float(good.mean()),
            device_hours=self.machines.device_s / 3600,
            cost=self.machines.cost_s / 3600,
            changes=self.machines.changes,
            deaths=self.machines.deaths,
            done=int(ended.sum()),
            at_s=np.array([at for at, _ in kept]),
            devices=held @ np.array([unit.devices for unit in self.units], dtype=np.float64),
            counts={unit.name: held[:, i] for i, unit in enumerate(self.units)},
            reasons=tuple(self.scaler.reasons),
            wall_s=wall_s,
        )


def waits(wait_s: Floats, layers: Floats, hop_s: float) -> tuple[Floats, Floats]:
    """([G], [G]): seconds engines waited for each group, and waited for it alone, after all others had answered.

    wait_s[K, P, G]: in one layer. layers[K]: how many layers of each pattern were run in each phase.
    """
    groups = wait_s.shape[2]
    waited: Floats = np.einsum("k,kpg->g", layers, wait_s + hop_s)
    if groups == 1:
        return waited, waited
    flat = wait_s.reshape(-1, groups)
    slowest = flat.argmax(axis=1)
    place = np.arange(len(flat))
    longest = flat[place, slowest]
    rest = flat.copy()
    rest[place, slowest] = 0.0
    alone = (longest - rest.max(axis=1)) * np.repeat(layers, wait_s.shape[1])
    return waited, np.bincount(slowest, alone, minlength=groups).astype(np.float64)

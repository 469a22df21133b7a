"""What all runs of a comparison share: the trace, its domains, the devices; and how they are laid out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoscale.signals import ROUTER
from autoscale.simulation.domains import domains_of, expert_loads, group_shares, mixture
from autoscale.simulation.machines import Lives, Unit
from autoscale.simulation.scenario import Calibration, Scenario
from autoscale.simulation.steps import Layout
from autoscale.traces import Trace
from cluster.config import HOME_POOL, deployment_name

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AFTER_S = 60.0
"""A run goes on that long after the last request, for every policy alike."""
WHOLE = "whole-model"


@dataclass(frozen=True)
class World:
    """One trace on one scenario. domain[N]: of each request. loads[D, P, E]. constants: see `Calibration`."""

    scenario: Scenario
    constants: dict[str, float]
    trace: Trace
    loads: Floats
    domain: Ints
    seed: int

    @property
    def ticks(self) -> int:
        """Of a run."""
        return int(np.ceil((self.trace.duration_s + AFTER_S) / self.scenario.tick_s))

    def layout(self, kind: Literal["split", "whole"], placement: str | None = None) -> Layout:
        """split: ExpertScale. whole: replicas with one device per group, no hop, the backbone on all of them."""
        scenario, constants = self.scenario, self.constants
        model, router = scenario.model, scenario.router
        split = kind == "split"
        home = scenario.pools[HOME_POOL]
        return Layout(
            shared=split,
            shares=self.shares(placement or model.placement),
            layers=model.layers,
            top_k=model.top_k,
            step_s=constants["step_s"],
            token_s=constants["token_s"],
            hop_s=constants["hop_s"] if split else 0.0,
            call_rows=home.call_s * home.rows_per_s,
            backbones=router.devices if split else max(model.groups, router.devices),
            max_sequences=router.max_sequences,
            max_batch_tokens=router.max_batch_tokens,
        )

    def shares(self, placement: str) -> Floats:
        """[D, P, G] of a placement."""
        return group_shares(self.loads, self.scenario.model.groups, placement)

    def split_units(self) -> list[Unit]:
        """One per (group, pool), then the routers."""
        pools = self.scenario.pools
        order = [HOME_POOL, *(name for name in pools if name != HOME_POOL)]
        units = [
            Unit(deployment_name(f"experts-{group}", pool), group, pool, 1, pools[pool].cost, pools[pool].rows_per_s)
            for group in range(self.scenario.model.groups)
            for pool in order
        ]
        return [*units, Unit(ROUTER, None, HOME_POOL, self.scenario.router.devices, pools[HOME_POOL].cost)]

    def whole_unit(self, pool: str = HOME_POOL) -> Unit:
        """The unit of whole-model replicas: as many devices as there are groups, all of one pool."""
        device = self.scenario.pools[pool]
        return Unit(WHOLE, None, pool, self.scenario.model.groups, device.cost, device.rows_per_s)

    def lives(self) -> Lives:
        """How replicas start and end: the same for all."""
        constants, mtbf_hours = self.constants, self.scenario.mtbf_hours
        return Lives(
            start_s=constants["start_s"] + self.scenario.weights_s,
            start_sigma=constants["start_sigma"],
            drain_s=constants["drain_s"],
            mtbf_s=None if mtbf_hours is None else mtbf_hours * 3600,
        )


def build(scenario: Scenario, calibration: Calibration, trace: Trace, seed: int) -> World:
    """Draw the domains of a trace's requests.

    Raises:
        PlacementError: the scenario's load or placement file does not fit.
    """
    loads = expert_loads(scenario.model, seed)
    mix = mixture(len(loads), scenario.drift, trace.duration_s, seed)
    world = World(
        scenario=scenario,
        constants=scenario.constants(calibration),
        trace=trace,
        loads=loads,
        domain=domains_of(trace.arrival_s, mix, seed),
        seed=seed,
    )
    world.shares(scenario.model.placement)
    return world


def demand(world: World, window_s: float = 60.0) -> tuple[Floats, Floats]:
    """Rows per second offered to each group, and tokens per second, in every window: ([K, G], [K])."""
    trace, model = world.trace, world.scenario.model
    windows = int(trace.duration_s / window_s) + 1
    tokens = np.zeros((windows, len(world.loads)))
    place = (trace.arrival_s / window_s).astype(np.int64)
    np.add.at(tokens, (place, world.domain), trace.prompt_tokens + trace.generated_tokens)
    tokens /= window_s
    rows = tokens @ world.shares(model.placement).mean(axis=1) * (model.top_k * model.layers)
    return rows, tokens.sum(axis=1)

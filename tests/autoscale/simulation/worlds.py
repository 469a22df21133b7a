"""Small worlds to simulate, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscale.simulation.run import Replay, Result
from autoscale.simulation.scalers import Static
from autoscale.simulation.scenario import Scenario, read_calibration
from autoscale.simulation.world import World, build
from autoscale.traces import Trace


def scenario(**changes: Any) -> Scenario:
    """4 groups of the demo model's loads, devices of 20,000 rows/s."""
    values: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "about": "a test",
        "model": {
            "layers": 4,
            "top_k": 2,
            "experts": 16,
            "groups": 4,
            "loads": "infra/demo-model/expert_load.json",
            "placement": "infra/demo-model/placement.yaml",
        },
        "pools": {"default": {"rows_per_s": 20000}},
        "slo": {"ttft_ms": 6000, "tpot_ms": 175},
    }
    return Scenario.model_validate(values | changes)


def steady(rate: float, duration_s: float, prompt: int = 512, generated: int = 20, seed: int = 0) -> Trace:
    """Poisson arrivals, all alike."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, int(rate * duration_s)))
    count = len(arrival)
    return Trace(arrival - arrival[0], np.full(count, prompt), np.full(count, generated))


def world(trace: Trace, seed: int = 0, **changes: Any) -> World:
    return build(scenario(**changes), read_calibration(), trace, seed)


def fixed(one: World, experts: int, routers: int) -> tuple[Replay, Result]:
    """A run with the same fixed number of replicas of every group."""
    units = one.split_units()
    counts = [routers if unit.group is None else experts * (unit.pool == "default") for unit in units]
    replay = Replay(one, one.layout("split"), units, counts, Static())
    result = replay.run("fixed", {})
    assert result is not None
    return replay, result

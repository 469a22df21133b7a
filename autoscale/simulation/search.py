"""Baselines with their best parameters: a grid search on the same trace, so that no baseline is weak by bad settings.

Best means: the least cost among those that keep the SLO of at least as many requests as was asked for; where none
does, the most requests kept. (One pool of cost 1: cost is GPU-hours.) The grid is walked axis by axis from its middle
until no axis improves any more, three rounds at most; every point is run once. A run is given up as soon as it
can be no better than the best so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autoscale.simulation.domains import PLACEMENTS, imbalance
from autoscale.simulation.policy_scaler import PolicyScaler
from autoscale.simulation.run import Limit, Replay, Result
from autoscale.simulation.scalers import OngoingRequests, ServeFormula, Static
from autoscale.simulation.world import World, demand
from autoscale.spec import PolicySpec
from cluster.config import HOME_POOL

Point = Mapping[str, float | int | str]
Grid = Mapping[str, Sequence[float | int | str]]

ROUNDS = 3
HEADROOMS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
DELAYS: Grid = {
    "downscale_delay_s": (10, 30, 60, 120, 300),
    "upscale_delay_s": (0, 5),
    "look_back_s": (2, 5, 10, 30),
}


@dataclass(frozen=True)
class Best:
    """The winner of a search. runs: points of the grid that were tried."""

    result: Result
    runs: int


def walk(grid: Grid, start: Point, attempt: Callable[[Point, Limit | None], Result | None], level: float) -> Best:
    """Coordinate descent. attempt: a run, or None where it was given up. level: share of requests to be kept."""
    tried: dict[tuple[tuple[str, float | int | str], ...], float] = {}
    best, best_point = attempt(start, None), dict(start)
    assert best is not None
    tried[tuple(best_point.items())] = 1
    for _ in range(ROUNDS):
        before = best_point
        for axis, values in grid.items():
            for value in values:
                point = {**best_point, axis: value}
                key = tuple(point.items())
                if key in tried:
                    continue
                tried[key] = 1
                limit = Limit(best.cost, level) if best.kept >= level else None
                result = attempt(point, limit)
                if result is not None and _better(result, best, level):
                    best, best_point = result, point
        if best_point == before:
            break
    return Best(best, len(tried))


def _better(one: Result, other: Result, level: float) -> bool:
    if (one.kept >= level) != (other.kept >= level):
        return one.kept >= level
    return one.cost < other.cost if one.kept >= level else one.kept > other.kept


def whole_model(world: World, level: float) -> Best:
    """Whole-model replicas, scaled by the requests in the system: Serve's formula.

    Its experts are placed as suits it best: where a prompt of one domain loads its devices most evenly. In mixed pools
    all of its devices are of one kind, which is part of the grid.
    """
    names = dict.fromkeys((*PLACEMENTS, world.scenario.model.placement))
    placement = min(names, key=lambda name: imbalance(world.shares(name)))
    layout = world.layout("whole", placement)
    most = max(1, 16 * world.scenario.max_replicas_hard)

    def attempt(point: Point, limit: Limit | None) -> Result | None:
        unit = world.whole_unit(str(point["pool"]))
        least = int(point["min_replicas"])
        rule = _rule(point, float(point["target_ongoing"]), least, most)
        replay = Replay(world, layout, [unit], [least], ServeFormula({0: rule}))
        return replay.run("whole model, ongoing requests", {**point, "placement": placement}, limit)

    grid: Grid = {
        "target_ongoing": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
        "min_replicas": (1, 2, 3, 4, 6, 8),
        **DELAYS,
        "pool": tuple(world.scenario.pools),
    }
    start: Point = {
        "target_ongoing": 4,
        "min_replicas": 1,
        "downscale_delay_s": 60,
        "upscale_delay_s": 0,
        "look_back_s": 5,
        "pool": HOME_POOL,
    }
    return walk(grid, start, attempt, level)


def serve_per_group(world: World, level: float) -> Best:
    """Groups and routers scaled by Serve's formula: calls in flight at a group, requests at the routers."""
    units = world.split_units()
    layout = world.layout("split")
    home = [index for index, unit in enumerate(units) if unit.group is not None and unit.pool == HOME_POOL]
    routers = len(units) - 1
    most = world.scenario.max_replicas_hard

    def attempt(point: Point, limit: Limit | None) -> Result | None:
        rule = _rule(point, float(point["target_ongoing"]), 1, most)
        router = _rule(point, float(point["router_target_ongoing"]), 1, most)
        scaler = ServeFormula(
            {**dict.fromkeys(home, rule), routers: router},
            {index: group for index in home if (group := units[index].group) is not None},
        )
        initial = [int(index in home or index == routers) for index in range(len(units))]
        return Replay(world, layout, units, initial, scaler).run("Serve's formula per group", point, limit)

    grid: Grid = {
        "target_ongoing": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2),
        "router_target_ongoing": (1, 2, 4, 8, 16, 32),
        **DELAYS,
    }
    start: Point = {
        "target_ongoing": 0.2,
        "router_target_ongoing": 4,
        "downscale_delay_s": 60,
        "upscale_delay_s": 0,
        "look_back_s": 5,
    }
    return walk(grid, start, attempt, level)


def ours(world: World, level: float, spec: PolicySpec, name: str) -> Best:
    """A policy file tuned on the trace as the baselines are: the keys below, everything else as written."""
    grid: Grid = {
        "target_critical_share": (0.15, 0.3, 0.5, 0.7, 0.9),
        "min_replicas": (1, 2, 3, 4, 6, 8),
        "router_min_replicas": (1, 2, 4, 8, 16),
        "router_max_replicas": (4, 8, 16, 64),
        "router_target_ongoing": (4, 8, 16, 32),
        "target_utilization": (0.45, 0.65, 0.85),
        "downscale_after_s": (10, 30, 60, 120, 300),
        "window_s": (2, 5),
    }
    start: Point = {
        "target_critical_share": 0.3,
        "min_replicas": 1,
        "router_min_replicas": 2,
        "router_max_replicas": 8,
        "router_target_ongoing": 16,
        "target_utilization": 0.65,
        "downscale_after_s": 60,
        "window_s": 2,
    }

    def attempt(point: Point, limit: Limit | None) -> Result | None:
        policy = tuned(spec, point, world.scenario.max_replicas_hard, world.lives().start_s)
        return replay_policy(world, policy, name, point, limit)

    return walk(grid, start, attempt, level)


def tuned(spec: PolicySpec, point: Point, most: int, start_s: float) -> PolicySpec:
    """The policy with the searched keys set, the same for all groups; up at once, within bounds as wide as Serve's own.

    The forecast's horizon is one start, as the policy file's own documentation says it should be.
    """
    delays = {
        "downscale": {"after_s": point["downscale_after_s"]},
        "upscale": {"after_s": 0, "max_step": most},
    }
    text = spec.model_dump(exclude_unset=True)
    text["signals"] = text.get("signals", {}) | {"window_s": point["window_s"]}
    text["forecast"] = text.get("forecast", {}) | {"horizon_s": start_s}
    text["defaults"] = text.get("defaults", {}) | {
        "target_utilization": point["target_utilization"],
        "target_critical_share": point["target_critical_share"],
        "min_replicas": point["min_replicas"],
        "max_replicas": most,
        **delays,
    }
    text["router"] = text.get("router", {}) | {
        "target_ongoing_requests": point["router_target_ongoing"],
        "min_replicas": point["router_min_replicas"],
        "max_replicas": max(int(point["router_max_replicas"]), int(point["router_min_replicas"])),
        **delays,
    }
    return PolicySpec.model_validate(text)


def replay_policy(
    world: World, spec: PolicySpec, name: str, parameters: Point, limit: Limit | None = None
) -> Result | None:
    """A policy on a cluster that starts with its minimum of everything, in the home pool."""
    units = world.split_units()
    initial = []
    for unit in units:
        if unit.group is None:
            initial.append(spec.router.min_replicas)
        else:
            least = spec.scaling(f"experts-{unit.group}").min_replicas
            initial.append(least if unit.pool == HOME_POOL else 0)
    scaler = PolicyScaler(spec, units, world.scenario.max_replicas_hard)
    return Replay(world, world.layout("split"), units, initial, scaler).run(name, parameters, limit)


def static(world: World, level: float, peak: bool) -> Best:
    """Fixed counts for the peak, or the mean, of what each group is offered; headroom: the utilisation aimed at there.

    The mean is not sized below a utilisation of 50 %: with enough headroom it would be the peak by another name.
    """
    units = world.split_units()
    layout = world.layout("split")
    name = "static peak" if peak else "static mean"

    def attempt(point: Point, limit: Limit | None) -> Result | None:
        window_s, headroom = float(point.get("window_s", 60)), float(point["utilization"])
        counts = static_counts(world, window_s, headroom, peak)
        return Replay(world, layout, units, counts, Static()).run(name, point, limit)

    if peak:
        return walk(
            {"utilization": HEADROOMS, "window_s": (5, 15, 60)}, {"utilization": 0.7, "window_s": 60}, attempt, level
        )
    return walk({"utilization": [h for h in HEADROOMS if h >= 0.5]}, {"utilization": 0.7}, attempt, level)


def static_counts(world: World, window_s: float, utilization: float, peak: bool) -> list[int]:
    """Replicas of each unit, all in the home pool, for the busiest window or for the mean."""
    rows, tokens = demand(world, window_s)
    of_groups = rows.max(axis=0) if peak else rows.mean(axis=0)
    of_routers = float(tokens.max() if peak else tokens.mean())
    layout = world.layout("split")
    fixed_s = layout.step_s + layout.layers * layout.hop_s
    token_s = layout.token_s / layout.backbones + fixed_s / layout.max_batch_tokens
    counts = []
    for unit in world.split_units():
        if unit.group is None:
            counts.append(max(1, math.ceil(of_routers * token_s / utilization)))
        elif unit.pool == HOME_POOL:
            counts.append(max(1, math.ceil(float(of_groups[unit.group]) / (utilization * unit.speed_rows_per_s))))
        else:
            counts.append(0)
    return counts


def _rule(point: Point, target: float, least: int, most: int) -> OngoingRequests:
    return OngoingRequests(
        target_ongoing_requests=target,
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=float(point["upscale_delay_s"]),
        downscale_delay_s=float(point["downscale_delay_s"]),
        look_back_period_s=float(point["look_back_s"]),
    )

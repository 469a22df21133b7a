"""The search of the best parameters: the level comes first, then the cost; every point once."""

from __future__ import annotations

import dataclasses

import numpy as np

from autoscale.simulation.run import Result
from autoscale.simulation.search import serve_per_group, static, tuned, walk, whole_model
from autoscale.spec import PolicySpec
from tests.autoscale.simulation.worlds import steady, world

NONE = np.zeros(1)
BLANK = Result("", {}, NONE, NONE, NONE, 0.0, 0.0, 0.0, 0, 0, 0, NONE, NONE, {})


def test_the_cheapest_that_keeps_the_level_wins():
    seen = []

    def attempt(point, limit):
        seen.append((point["a"], point["b"]))
        cost = (point["a"] - 3) ** 2 + (point["b"] - 2) ** 2 + 1
        assert limit is None or limit.kept == 0.9
        return dataclasses.replace(BLANK, parameters=point, cost=cost, kept=0.95 if point["a"] >= 2 else 0.5)

    best = walk({"a": range(6), "b": range(6)}, {"a": 0, "b": 0}, attempt, 0.9)
    assert best.result.parameters == {"a": 3, "b": 2}
    assert len(seen) == len(set(seen)) == best.runs


def test_where_none_keeps_the_level_the_most_kept_wins():
    def attempt(point, limit):
        assert limit is None
        return dataclasses.replace(BLANK, parameters=point, cost=1.0, kept=point["a"] / 10)

    assert walk({"a": range(6)}, {"a": 0}, attempt, 0.9).result.parameters == {"a": 5}


def test_every_baseline_reaches_a_level_that_can_be_reached():
    one = world(steady(3, 90))
    for best in (whole_model(one, 0.9), serve_per_group(one, 0.9), static(one, 0.9, peak=True)):
        assert best.result.kept >= 0.9
        assert best.result.device_hours > 0
    assert static(one, 0.9, peak=False).result.kept <= 1


def test_the_whole_model_places_its_experts_as_suits_it_best():
    best = whole_model(world(steady(1, 60)), 0.5).result
    assert best.parameters["placement"] in ("contiguous", "balanced")


def test_tuning_changes_the_searched_keys_and_leaves_the_rest_of_the_policy():
    spec = PolicySpec.model_validate(
        {"version": 1, "budget": {"gpus": 9}, "defaults": {"hysteresis": 0.3, "min_replicas": 2}}
    )
    point = {
        "min_replicas": 3,
        "router_min_replicas": 8,
        "router_max_replicas": 4,
        "router_target_ongoing": 8,
        "target_utilization": 0.45,
        "target_critical_share": 0.4,
        "downscale_after_s": 30,
        "window_s": 2,
    }
    found = tuned(spec, point, 64, 4.04)
    assert (found.defaults.min_replicas, found.defaults.max_replicas, found.defaults.hysteresis) == (3, 64, 0.3)
    assert (found.router.min_replicas, found.router.max_replicas) == (8, 8)
    assert found.budget.gpus == 9
    assert found.forecast.horizon_s == 4.04
    assert found.defaults.downscale.after_s == found.router.downscale.after_s == 30

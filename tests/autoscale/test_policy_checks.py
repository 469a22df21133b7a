"""What a policy asks of a fleet in vain, sentence by sentence. Well under a second."""

from __future__ import annotations

from typing import Any

import pytest

from autoscale.policy_checks import check_against
from autoscale.signals import ROUTER, Fleet, UnitFacts
from autoscale.spec import PolicySpec
from cluster.config import HOME_POOL, deployment_name


def fleet(groups: int = 2, pools: tuple[str, ...] = (), hard: int = 4, routers: bool = True) -> Fleet:
    """Replicas at home take a GPU and two CPUs, in other pools half a GPU and one CPU; a router a GPU and a CPU."""
    units = [
        UnitFacts(
            deployment_name(f"experts-{group}", pool),
            f"experts-{group}",
            pool,
            gpus=1 if pool == HOME_POOL else 0.5,
            cpus=2 if pool == HOME_POOL else 1,
        )
        for group in range(groups)
        for pool in (HOME_POOL, *pools)
    ]
    units += [UnitFacts(ROUTER, None, gpus=1, cpus=1)] if routers else []
    return Fleet({unit.name: unit for unit in units}, hard)


def test_what_is_fixed_is_part_of_what_the_minima_take() -> None:
    known = fleet(routers=False)
    assert check(known, budget={"gpus": 2}) == []
    known = Fleet(known.units, known.max_replicas_hard, ((UnitFacts(ROUTER, None, gpus=1, cpus=1), 2),))
    assert "at least 4" in check(known, budget={"gpus": 2})[0]
    assert check(known, budget={"replicas": 2}) == [], "routers are no expert replicas"


@pytest.mark.parametrize("word", ["cluster", "nodes"])
def test_a_budget_left_to_the_cluster_is_compared_when_the_cluster_is_known(word: str) -> None:
    assert check(fleet(), budget={"gpus": word, "cpus": word}) == []


def check(known: Fleet, **parts: Any) -> list[str]:
    return list(check_against(PolicySpec.model_validate({"version": 1, **parts}), known))


def entry(**parts: Any) -> dict[str, Any]:
    return {"cron": "0 8 * * *", "duration_s": 60, **parts}


def test_a_version_alone_suits_every_fleet_even_where_serve_allows_less_than_the_defaults() -> None:
    for known in (fleet(), fleet(hard=1), fleet(0), fleet(3, ("h100",)), fleet(0, routers=False)):
        assert check(known) == []


@pytest.mark.parametrize(
    ("parts", "key", "value", "allowed"),
    [
        ({"groups": [{"match": "nobody-*"}]}, "groups.0.match", "'nobody-*'", "experts-0, experts-1"),
        ({"schedule": [entry(groups={"EXPERTS-0": {}})]}, "schedule.0.groups.EXPERTS-0", "'EXPERTS-0'", "experts-0, "),
        ({"pools": {"l4": {}}}, "pools", "'l4'", "the pools are default, h100"),
        ({"defaults": {"pools": ["default", "l4"]}}, "defaults.pools", "'l4'", "the pools are default, h100"),
        ({"groups": [{"match": "*", "pools": ["default", "l4"]}]}, "groups.0.pools", "'l4'", "default, h100"),
        ({"budget": {"cpus": {"l4": 9}}}, "budget.cpus", "'l4'", "default, h100"),
        ({"defaults": {"pools": ["h100"]}}, "defaults.pools", "['h100']", "'default' must be among them"),
        ({"defaults": {"max_replicas": 9}}, "defaults.max_replicas", "9", "1 to 8, that is 4 in each of 2 pools"),
        (
            {"groups": [{"match": "experts-1", "max_replicas": 5, "pools": ["default"]}]},
            "groups.0.max_replicas",
            "5",
            "max_replicas_hard allows 1 to 4",
        ),
        (
            {"schedule": [entry(groups={"experts-*": {"min_replicas": 9}})]},
            "schedule.0.groups.experts-*.min_replicas",
            "9",
            "1 to 8",
        ),
        ({"router": {"max_replicas": 5}}, "router.max_replicas", "5", "1 to 4"),
        ({"schedule": [entry(router={"min_replicas": 5})]}, "schedule.0.router.min_replicas", "5", "1 to 4"),
        ({"budget": {"replicas": 1}}, "budget.replicas", "1", "at least 2"),
        ({"budget": {"gpus": 2.5}}, "budget.gpus", "2.5", "at least 3,"),  # two groups and a router
        ({"budget": {"cpus": 4.9}}, "budget.cpus", "4.9", "at least 5,"),
        ({"budget": {"replicas": {"default": 1}}}, "budget.replicas.default", "1", "at least 2,"),
        ({"budget": {"gpus": {"default": 2}}}, "budget.gpus.default", "2", "at least 3,"),
        ({"pools": {"default": {"max_replicas": 0}}}, "pools.default.max_replicas", "0", "at least 2,"),
        (
            {"defaults": {"min_replicas": 3}, "budget": {"gpus": 4.5}},
            "budget.gpus",
            "4.5",
            "at least 5,",  # one of each group at home, two more of each where they take half a GPU, and a router
        ),
        (
            {"defaults": {"min_replicas": 3}, "budget": {"replicas": {"default": 3, "h100": 2}}},
            "budget.replicas",
            "5",
            "at least 6,",
        ),
        (
            {
                "groups": [{"match": "experts-0", "min_replicas": 3, "pools": ["default"]}],
                "budget": {"replicas": {"default": 3}},
            },
            "budget.replicas.default",
            "3",
            "at least 4,",
        ),
        (
            {"budget": {"replicas": 4}, "schedule": [entry(), entry(groups={"experts-*": {"min_replicas": 3}})]},
            "budget.replicas",
            "4",
            "at least 6, which the minima of all together take with schedule.1 active",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence_naming_key_value_and_what_is_allowed(
    parts: dict[str, Any], key: str, value: str, allowed: str
) -> None:
    (sentence,) = check(fleet(2, ("h100",)), **parts)
    assert sentence.startswith(f"{key}: the value {value} is not allowed: ")
    assert allowed in sentence
    assert sentence.endswith(".")


def test_just_enough_is_enough() -> None:
    parts = {
        "defaults": {"min_replicas": 3, "max_replicas": 8},
        "budget": {"replicas": 6, "gpus": 5, "cpus": {"default": 5, "h100": 4}},
        "pools": {"default": {"max_replicas": 2}, "h100": {"max_replicas": 4}},
        "router": {"max_replicas": 4},
    }
    assert check(fleet(2, ("h100",)), **parts) == []


def test_a_rule_that_overrides_a_default_hides_it() -> None:
    rules = [{"match": "*", "max_replicas": 4}]
    assert check(fleet(), defaults={"max_replicas": 9}, groups=rules) == []


def test_routers_of_a_fixed_number_have_no_bounds_to_exceed() -> None:
    known = fleet(routers=False)
    assert check(known, router={"max_replicas": 9}, budget={"gpus": 2}) == []


def test_each_key_is_named_once_and_a_long_list_is_cut() -> None:
    errors = check(fleet(30), budget={"replicas": 1}, groups=[{"match": "x"}], schedule=[entry(), entry()])
    assert len(errors) == 2
    assert "experts-9 and 20 more" in errors[0]

"""Budgets left to the cluster: numbers once it is known, no decision before, the last known with its age. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoscale.cluster_budget import STALE_S, Given, budget_of
from autoscale.policy import PolicyState, decide
from autoscale.policy_file import read
from autoscale.signals import ROUTER, Fleet, GroupLoad, Signals, UnitFacts
from autoscale.spec import PolicySpec
from cluster.errors import ConfigError
from cluster.nodes.offers import Offer
from tests.autoscale.fleets import at

L4, H100 = ({"ray.io/accelerator-type": kind} for kind in ("L4", "H100"))
UNITS = [
    UnitFacts("experts-0", "experts-0", gpus=1, cpus=2, selector=L4),
    UnitFacts("experts-0-h100", "experts-0", "h100", gpus=0.5, cpus=4, selector=H100),
]
FIXED = ((UnitFacts(ROUTER, None, cpus=1), 1),)
FLEET = Fleet({unit.name: unit for unit in UNITS}, 8, FIXED)
OFFERS = (Offer("l4", 4, 1, 8, L4), Offer("h100", 1, 8, 64, H100), Offer("cpu", 3, 0, 4))


def policy(**budget: Any) -> PolicySpec:
    return PolicySpec.model_validate({"version": 1, "budget": budget})


def given(**changes: Any) -> Given:
    return replace(Given("kubernetes", OFFERS, at=1000.0), **changes)


def test_each_resource_left_to_the_cluster_is_bounded_in_all_and_by_pool() -> None:
    found = budget_of(policy(gpus="cluster", replicas=7), FLEET, given(), 1000)
    assert found.amounts == {("gpus", None): 12, ("gpus", "default"): 4, ("gpus", "h100"): 8}
    assert found.notes == ()
    spec = policy(gpus="cluster", replicas=7)
    limits = spec.budget.given(found.amounts or {}).limits
    assert limits == {**(found.amounts or {}), ("replicas", None): 7}


def test_a_router_without_a_selector_runs_anywhere_in_its_pool() -> None:
    found = budget_of(policy(cpus="cluster"), FLEET, given(), 1000)
    assert found.amounts == {("cpus", None): 108, ("cpus", "default"): 108, ("cpus", "h100"): 64}


@pytest.mark.parametrize(
    "unknown", [None, Given("kubernetes", troubles=("away",)), Given("kubernetes", OFFERS, at=1000.0, by_nodes=True)]
)
def test_what_was_never_known_is_no_decision_and_no_zero(unknown: Given | None) -> None:
    found = budget_of(policy(gpus="cluster"), FLEET, unknown, 1000)
    assert found.amounts is None
    assert found.notes == ("budget.gpus: no decision, what the cluster can give is not known yet",)


def test_a_cluster_without_any_gpu_is_no_budget_of_zero() -> None:
    found = budget_of(policy(gpus="cluster"), FLEET, given(offers=OFFERS[2:]), 1000)
    assert found.amounts is None
    assert "nothing in the cluster has any gpus" in found.notes[0]


def test_what_is_old_counts_with_its_age() -> None:
    late = budget_of(policy(gpus="cluster"), FLEET, given(), 1000 + STALE_S + 240)
    assert late.amounts == budget_of(policy(gpus="cluster"), FLEET, given(), 1000).amounts
    assert late.notes == ("budget.gpus: as the cluster was 5 min ago, it cannot be asked now",)


def test_a_pool_nothing_suits_is_told_and_bounded_by_all_together() -> None:
    found = budget_of(policy(gpus="cluster"), FLEET, given(offers=OFFERS[:1]), 1000)
    assert found.amounts == {("gpus", None): 4, ("gpus", "default"): 4}
    assert "no machine of the cluster has the labels that replicas of pool h100 ask for" in found.notes[0]


def test_a_budget_in_numbers_needs_no_cluster() -> None:
    assert budget_of(policy(gpus=3), FLEET, None, 1000).amounts == {}


def test_growth_ends_where_the_cluster_does() -> None:
    spec = PolicySpec.model_validate(
        {"version": 1, "budget": {"gpus": "cluster"}, "defaults": {"min_replicas": 8, "max_replicas": 8}}
    )
    fleet = Fleet({UNITS[0].name: UNITS[0]}, 8)
    found = budget_of(spec, fleet, given(), 1000)
    numbers = spec.model_copy(update={"budget": spec.budget.given(found.amounts or {})})
    load = GroupLoad(offered_rows_per_s=1, speed_rows_per_s={"default": 1000.0})
    state, counts = PolicyState(), 1
    for tick in range(5):
        signals = Signals({"experts-0": at(counts)}, {"experts-0": load}, None)
        decision = decide(signals, numbers, fleet, state, 1000.0 + tick)
        state, counts = decision.state, decision.targets.get("experts-0", counts)
    assert counts == 4
    assert "budget: 4 gpus in pool default, all held" in decision.held_back[0]


@pytest.mark.parametrize("word", ["clutser", "", "Cluster", "all"])
def test_another_word_is_one_sentence(tmp_path: Any, word: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\nbudget: {{gpus: '{word}'}}\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value) == (
        f"budget.gpus: the value {word!r} is not allowed: "
        "Input should be a number, pool -> number, 'cluster' or 'nodes'."
    )


def test_replicas_cannot_be_left_to_the_cluster(tmp_path: Any) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nbudget: {replicas: cluster}\n")
    with pytest.raises(ConfigError, match=r"budget\.replicas: the value 'cluster' is not allowed"):
        read(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prewarm: {}", "prewarm.lead_s: missing, and it has no default"),
        (
            "prewarm: {lead_s: 0}",
            "prewarm.lead_s: the value 0 is not allowed: Input should be greater",
        ),
        (
            "prewarm: {lead_s: 5, groups: []}",
            "prewarm.groups: unknown key; allowed here: forecast, lead_s, ",
        ),
        ("prewarm: {lead_s: 5, worker_groups: ['']}", "prewarm.worker_groups.0: the value '' is not allowed"),
        ("kubernetes: {rayservice: Not_A_Name}", "kubernetes.rayservice: the value 'Not_A_Name' is not allowed"),
        ("kubernetes: {token: x}", "kubernetes.token: unknown key; allowed here: kubeconfig, namespace, rayservice."),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path: Any, text: str, sentence: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(sentence)
    assert len(str(caught.value).splitlines()) == 1

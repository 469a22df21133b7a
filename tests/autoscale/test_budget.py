from __future__ import annotations

from typing import Any

import pytest

from autoscale.budget import Ledger
from autoscale.pools import Scalable, Unit, scalables
from autoscale.signals import Signals, UnitCounts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import at, group_fleet


def ledger(counts: dict[str, UnitCounts], **spec: Any) -> tuple[Ledger, dict[str, Unit], list[Scalable]]:
    """Two groups in two pools and routers; what has no counts has none running."""
    fleet = group_fleet(2, ("default", "h100"), routers=True)
    full = {name: counts.get(name, at(0)) for name in fleet.units}
    policy = PolicySpec(version=1, **spec)
    listed = scalables(Signals(full, {}, None), policy, fleet)
    return Ledger(listed, policy), {unit.facts.name: unit for each in listed for unit in each.units}, listed


def test_without_bounds_there_is_always_room() -> None:
    book, units, _ = ledger({"experts-0": at(100)})
    assert all(book.grow(units["experts-0"]) for _ in range(100))
    assert not book.overdrawn([])


@pytest.mark.parametrize(
    "budget", [{"replicas": 5}, {"gpus": 5}, {"replicas": {"default": 5}}, {"gpus": {"default": 5}}]
)
def test_starting_and_leaving_replicas_hold_the_budget_too(budget: dict[str, Any]) -> None:
    book, units, _ = ledger({"experts-0": at(1, 2), "experts-1": at(1, 1, leaving=1), "Router": at(1)}, budget=budget)
    assert book.grow(units["experts-0"])
    assert not book.grow(units["experts-0"])
    assert not book.grow(units["experts-1"])
    assert units["experts-0"].target == 3


def test_a_budget_per_pool_bounds_the_pools_it_names_only() -> None:
    book, units, _ = ledger({"experts-0": at(1)}, budget={"gpus": {"default": 1}})
    assert not book.grow(units["experts-0"])
    assert all(book.grow(units["experts-0-h100"]) for _ in range(8))


def test_pools_have_bounds_of_their_own_for_all_groups_together() -> None:
    book, units, _ = ledger({"experts-1-h100": at(1)}, pools={"h100": {"max_replicas": 2}})
    assert book.grow(units["experts-0-h100"])
    assert not book.grow(units["experts-1-h100"])
    assert book.describe(book.lacking(units["experts-1-h100"])) == "pool h100: 2 replicas, all held"


def test_routers_hold_cpus_but_no_replicas() -> None:
    book, units, _ = ledger({"Router": at(2)}, budget={"cpus": 3, "replicas": 0})
    assert book.grow(units["Router"])
    assert not book.grow(units["Router"])
    assert not book.grow(units["experts-0"])
    assert book.describe(book.lacking(units["experts-0"])) == "budget: 0 replicas, all held"


def test_what_is_taken_back_is_free_only_when_it_is_gone() -> None:
    book, units, _ = ledger({"experts-0": at(1, 3), "experts-1": at(1)}, budget={"replicas": 4})
    book.shrink(units["experts-0"], 2)
    assert not book.grow(units["experts-1"])
    assert book.comes(units["experts-1"])
    book.expects(units["experts-1"])
    book.expects(units["experts-1"])
    assert not book.comes(units["experts-1"])


def test_what_is_leaving_already_will_be_free_and_overdraws_nothing() -> None:
    book, units, listed = ledger({"experts-0": at(2, 2, leaving=3)}, budget={"replicas": 4})
    assert book.lacking(units["experts-1"]) == [("replicas", None)]
    assert book.comes(units["experts-1"])
    assert not book.overdrawn(listed)


def test_targets_beyond_the_budget_overdraw_it() -> None:
    book, units, listed = ledger({"experts-0": at(3), "experts-1": at(2)}, budget={"replicas": 4})
    assert book.overdrawn(listed) == {("replicas", None): 1}
    assert book.eases(units["experts-0"], book.overdrawn(listed))
    assert not book.eases(units["Router"], book.overdrawn(listed))


def test_shares_of_a_cpu_add_up() -> None:
    book, units, _ = ledger({}, budget={"cpus": 3})
    assert sum(book.grow(units["Router"]) for _ in range(9)) == 3

"""Budgets that say `cluster` or `nodes`: from what the cluster was last known to give, to numbers. Pure.

    cluster   worker groups up to their maxReplicas, which Ray's autoscaler brings; outside Kubernetes Ray's own nodes
    nodes     no more of them than the nodes there are now have room for; said of one resource it holds for both

What was never known is no number: there is no decision then. What has grown old counts as it was last known, and is
told with its age. A pool whose replicas no machine can run is bounded by what all can give together, and told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoscale.signals import Fleet, UnitFacts
from autoscale.spec import Account, PolicySpec
from cluster.nodes.offers import Offer, Resource, Selector, capacity

STALE_S = 60.0
"""Four readings: from then on the age is told."""


@dataclass(frozen=True)
class Given:
    """What is known of the cluster. source: who says so. offers: None before they are known; by_nodes: no more of them
    than the nodes of that moment have room for.

    at: when they were last known to hold, monotonic seconds; read_at: the same in Unix seconds.
    shown: parts for `/v1/cluster`. ended: pre-warming was told to end, and nothing is raised. troubles: sentences.
    """

    source: str
    offers: tuple[Offer, ...] | None = None
    at: float = float("-inf")
    read_at: float | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    by_nodes: bool = False
    ended: bool = False
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """amounts: what is given; None where nothing is to be decided. notes: one sentence each."""

    amounts: Mapping[Account, float] | None
    notes: tuple[str, ...] = ()


def budget_of(spec: PolicySpec, fleet: Fleet, given: Given | None, now: float) -> Budget:
    """What the resources that `spec` leaves to the cluster amount to."""
    asks = spec.budget.asks
    if not asks:
        return Budget({})
    names = " and ".join(f"budget.{resource}" for resource in asks)
    # An answer to another question, of a policy before this one, is none.
    if given is None or given.offers is None or given.by_nodes != ("nodes" in asks.values()):
        return Budget(None, (f"{names}: no decision, what the cluster can give is not known yet",))
    amounts: dict[Account, float] = {}
    notes = []
    for resource in asks:
        found = capacity(given.offers, resource, _selectors(fleet, resource))
        if found.total <= 0 and any(_amount(unit, resource) > 0 for unit in fleet.units.values()):
            return Budget(None, (f"budget.{resource}: no decision, nothing in the cluster has any {resource}",))
        amounts[(resource, None)] = found.total
        amounts |= {(resource, pool): amount for pool, amount in found.pools.items()}
        notes += [
            f"budget.{resource}: no machine of the cluster has the labels that replicas of pool {pool} ask for"
            for pool in found.unmatched
        ]
    age_s = now - given.at
    if age_s > STALE_S:
        notes.append(f"{names}: as the cluster was {_age(age_s)} ago, it cannot be asked now")
    return Budget(amounts, tuple(notes))


def _selectors(fleet: Fleet, resource: Resource) -> dict[str, list[Selector]]:
    """Pool -> what its replicas, and the routers that count in it, ask of a node."""
    found: dict[str, list[Selector]] = {}
    for unit in _units(fleet):
        if _amount(unit, resource) > 0:
            selectors = found.setdefault(unit.pool, [])
            if unit.selector not in selectors:
                selectors.append(unit.selector)
    return found


def _units(fleet: Fleet) -> Iterator[UnitFacts]:
    yield from fleet.units.values()
    for unit, _ in fleet.fixed:
        yield unit


def _amount(unit: UnitFacts, resource: Resource) -> float:
    return unit.gpus if resource == "gpus" else unit.cpus


def _age(seconds: float) -> str:
    """By minutes: a report that changes each second would be sent each second."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

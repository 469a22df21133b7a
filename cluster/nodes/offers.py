"""What machines a cluster can have, and what of it which replicas can use. Pure; knows no Kubernetes and no Ray.

An offer is a number of machines alike: a worker group up to its limit, or one of Ray's own nodes. Replicas say by label
selectors, in Ray's words, where they may run.

    total   what all offers give together
    pool    what those give on which some replica of the pool may run. Pools that share machines share this, too: it
            bounds each of them, the total bounds them together.

Offers that share nodes share them as pools do: each of them has all its nodes, together they have each node once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Ray's own label of a node, and what `accelerator_type` of a replica asks for."""
PRICE_LABEL = "expertscale.io/price-per-hour"
"""On nodes and on worker groups: what one machine costs for an hour, in any unit, the same for all."""
ROUNDING = 1e-6

Selector = Mapping[str, str]
Resource = Literal["gpus", "cpus"]


@dataclass(frozen=True)
class Offer:
    """At most `most` machines alike. gpus, cpus: of one of them. labels: Ray's labels of its nodes.

    pods: node -> how many pods have room there while nothing else runs there; None where nodes do not bound them.
    hosts: pods of one machine.
    """

    name: str
    most: int
    gpus: float
    cpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    pods: Mapping[str, int] | None = None
    hosts: int = 1

    def fit(self, gpus: float, cpus: float) -> int:
        """How many replicas that take so much each fit one machine; 0 for what takes nothing, too."""
        counts = [
            int(there / each + ROUNDING) for there, each in ((self.gpus, gpus), (self.cpus, cpus)) if each > ROUNDING
        ]
        return min(counts, default=0)


@dataclass(frozen=True)
class Capacity:
    """Of one resource. total: all there can be. pools: pool -> what its replicas can use.

    unmatched: pools whose replicas no machine offered can run.
    """

    total: float
    pools: Mapping[str, float]
    unmatched: tuple[str, ...] = ()


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether Ray would run a replica with this `label_selector` on a node with these labels."""
    return all(_holds(wanted.strip(), labels.get(key)) for key, wanted in selector.items())


def capacity(offers: Iterable[Offer], resource: Resource, selectors: Mapping[str, Iterable[Selector]]) -> Capacity:
    """What `offers` give of a resource. selectors: pool -> those of the replicas in it that take of the resource."""
    having = [(offer, float(getattr(offer, resource))) for offer in offers if getattr(offer, resource) > 0]
    pools: dict[str, float] = {}
    unmatched = []
    for pool, wanted in selectors.items():
        wanted = list(wanted)
        usable = [pair for pair in having if any(matches(selector, pair[0].labels) for selector in wanted)]
        if usable:
            pools[pool] = _sum(usable)
        else:
            unmatched.append(pool)
    return Capacity(_sum(having), pools, tuple(unmatched))


def _sum(having: Iterable[tuple[Offer, float]]) -> float:
    """What they give together. A node that several of them can use counts once."""
    free: dict[str, float] = {}
    total = 0.0
    # The most particular first, and of those alike what makes most of a node: others take what these leave.
    for offer, each in sorted(having, key=lambda pair: (len(pair[0].pods or ()), -pair[1])):
        total += each * (offer.most if offer.pods is None else _placed(offer, offer.pods, free))
    return total


def _placed(offer: Offer, pods: Mapping[str, int], free: dict[str, float]) -> int:
    """How many of its machines have room. free: node -> the share of it that is left, changed here; all if absent."""
    placed = 0
    for node, fit in pods.items():
        left = free.get(node, 1.0)
        here = min(offer.most * offer.hosts - placed, int(left * fit + ROUNDING))
        free[node] = left - here / fit
        placed += here
    return placed // offer.hosts


def _holds(wanted: str, value: str | None) -> bool:
    """Ray's four forms: `a`, `!a`, `in(a, b)` and `!in(a, b)`. A label that is missing is none of them."""
    negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        names = {name.strip() for name in wanted[3:-1].split(",")}
    else:
        names = {wanted}
    return (value in names) != negated

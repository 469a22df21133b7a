"""Asks the cluster what it can give, and for machines before a peak, while a tick may not wait: a thread of its own.

In Kubernetes a turn is the keeper's (`cluster.nodes.keeper`); elsewhere Ray's nodes are all there is, and nothing can
be pre-warmed. `latest` and `want` return at once. Nothing that happens here is raised; what goes wrong is in the
answer, logged once and tried again. The thread ends with the object it serves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from autoscale.capacity_spec import KubernetesSpec
from autoscale.cluster_budget import Given
from cluster.config import resolve
from cluster.nodes.inventory import node_pools, offers
from cluster.nodes.keeper import Keeper, Prewarm, Seen, Wish
from cluster.nodes.offers import ACCELERATOR_LABEL, Offer
from cluster.nodes.place import Elsewhere, Place, find_place

logger = logging.getLogger(__name__)

TURN_S = 0.5
MISTAKE_S = 30.0
RAY_PERIOD_S = 5.0
"""How often Ray's own nodes are read."""
ENDED = Prewarm(patterns=())
"""Nothing may be raised, and what is raised is let go."""
_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Wanted:
    """budget, nodes: whether a budget is left to the cluster, and to its nodes of this moment. prewarm: None if off."""

    budget: bool = False
    nodes: bool = False
    prewarm: Prewarm | None = None


class ClusterLink:
    """spec: whom to ask. `latest`: what is known, None before the first turn."""

    def __init__(self, spec: KubernetesSpec, environment: Mapping[str, str] = os.environ) -> None:
        self._place = find_place(
            environment,
            kubeconfig=None if spec.kubeconfig is None else str(resolve(spec.kubeconfig)),
            namespace=spec.namespace,
            rayservice=spec.rayservice,
        )
        self._wanted = Wanted()
        self._latest: Given | None = None
        turn = _keeper_turn(self._place) if isinstance(self._place, Place) else _ray_turn(self._place)
        threading.Thread(target=_loop(weakref.ref(self), turn), name="cluster-link", daemon=True).start()

    @property
    def latest(self) -> Given | None:
        """The newest answer."""
        return self._latest

    def want(self, wanted: Wanted) -> None:
        """From the next turn on."""
        self._wanted = wanted

    def _turn(self, turn: Turn) -> float:
        """-> seconds until the next."""
        try:
            self._latest = turn(self._wanted, self._latest)
            return TURN_S
        except Exception as error:
            # A mistake of ours: what is known stays, and grows old.
            logger.exception("the cluster cannot be looked at; trying on")
            self._latest = replace(self._latest or Given("nobody"), troubles=(f"what the cluster says: {error!r}",))
            return MISTAKE_S


Turn = Callable[[Wanted, Given | None], Given]


def _loop(link: weakref.ref[ClusterLink], turn: Turn) -> Callable[[], None]:
    def run() -> None:
        while (owner := link()) is not None:
            wait_s = owner._turn(turn)
            del owner
            time.sleep(wait_s)

    return run


def _keeper_turn(place: Place) -> Turn:
    keeper = Keeper(place, time.monotonic)

    def turn(wanted: Wanted, _last: Given | None) -> Given:
        seen = keeper.turn(Wish(wanted.nodes, wanted.prewarm))
        ended = wanted.prewarm == ENDED and seen.answered == ENDED and not seen.raised
        return replace(given_of(seen, wanted.nodes), ended=ended)

    return turn


def given_of(seen: Seen, by_nodes: bool) -> Given:
    """What Kubernetes gives. by_nodes: no more than its nodes have room for now."""
    known = seen.groups is not None and not (by_nodes and seen.nodes is None)
    at = min(seen.groups_at, seen.nodes_at) if by_nodes else seen.groups_at
    shown: dict[str, Any] = {
        "worker_groups": [group.as_json() for group in seen.groups or ()],
        "prewarmed": {name: {"from": each.found, "to": each.set} for name, each in sorted(seen.raised.items())},
    }
    if seen.nodes is not None:
        shown["node_pools"] = [pool.as_json() for pool in node_pools(seen.nodes)]
    return Given(
        source="kubernetes",
        offers=offers(seen.groups or (), seen.nodes if by_nodes else None) if known else None,
        at=at,
        read_at=time.time() - (time.monotonic() - at) if known else None,
        shown=shown,
        by_nodes=by_nodes,
        troubles=seen.troubles,
    )


def _ray_turn(place: Elsewhere) -> Turn:
    due_at, complaint = float("-inf"), ""

    def turn(wanted: Wanted, last: Given | None) -> Given:
        nonlocal due_at, complaint
        troubles = []
        if wanted.prewarm is not None and wanted.prewarm.patterns:
            troubles.append(f"prewarm: off, {place.reason}")
        last = last or Given("ray")
        offered, at, read_at, shown = last.offers, last.at, last.read_at, last.shown
        now = time.monotonic()
        if wanted.budget and now >= due_at:
            due_at, complaint = now + RAY_PERIOD_S, ""
            try:
                offered = ray_offers(ray.nodes())
                at, read_at = now, time.time()
                shown = {"nodes": [{"name": each.name, "gpus": each.gpus, "cpus": each.cpus} for each in offered]}
            except Exception as error:
                complaint = f"ray does not say which nodes it has: {error!r}"
                logger.warning("%s", complaint)
        troubles += [complaint] if complaint else []
        return Given("ray", offered, at, read_at, shown, wanted.nodes, ended=True, troubles=tuple(troubles))

    return turn


def ray_offers(rows: list[dict[str, Any]]) -> tuple[Offer, ...]:
    """Ray's own nodes, as `ray.nodes()` lists them, that are alive."""
    found = []
    for row in rows:
        if not row.get("Alive"):
            continue
        resources, labels = row.get("Resources") or {}, dict(row.get("Labels") or {})
        for name in resources:
            if name.startswith(_ACCELERATOR):
                labels.setdefault(ACCELERATOR_LABEL, name.removeprefix(_ACCELERATOR))
        name = str(row.get("NodeName") or row.get("NodeID"))
        found.append(Offer(name, 1, float(resources.get("GPU", 0)), float(resources.get("CPU", 0)), labels))
    return tuple(found)

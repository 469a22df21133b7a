"""The Kubernetes side of heterogeneous capacity: what the cluster can give, and machines asked for before a peak.

    offers.py      what machines there may be, of a worker group or of Ray's own nodes; which replicas run on them; pure
    inventory.py   the RayCluster's worker groups and the cluster's nodes, read off the API's objects; pure
    prewarm.py     how many machines replicas need, and the change of `minReplicas` that asks for them; pure
    place.py       whether this is Kubernetes at all, and where in it we are
    api.py         the four requests that are made, and what each refusal means, as a sentence
    node_watch.py  the nodes, listed and then watched, in a thread of its own
    keeper.py      one turn: read what is due, change what is wanted, keep what was last known

Nothing here knows Serve, Ray or a policy. `kubernetes` is imported by `api.connect` alone, once there is a place to
connect to: outside Kubernetes it costs nothing.

Labels that are read: `ray.io/accelerator-type` and whatever else replicas select by, of worker groups;
`expertscale.io/price-per-hour` of worker groups and nodes; `expertscale.io/pool` and `/gpu` of nodes, else what the
clouds put there. The annotation `expertscale.io/prewarm` of a RayCluster is ours.

What may be done there, and nothing else, is `RBAC`: reading our RayService by its name; reading the RayClusters it has
made, whose names are not known beforehand, and changing `minReplicas` of their worker groups; and, only where the
policy says `budget: {gpus: nodes}`, listing and watching the nodes of the whole cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One rule of a Role, or of a ClusterRole. by_name: only for our own RayService. why: what fails without it."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    cluster_wide: bool = False
    by_name: bool = False
    why: str = ""


RBAC = (
    Rule("ray.io", "rayservices", ("get",), by_name=True, why="which RayCluster is in service"),
    Rule("ray.io", "rayclusters", ("get",), why="the worker groups and their limits"),
    Rule("ray.io", "rayclusters", ("patch",), why="pre-warming: minReplicas of worker groups"),
    Rule("", "nodes", ("list", "watch"), cluster_wide=True, why="budgets that say `nodes`"),
)
"""Everything that is ever asked of the API server, by resource; each needs its verbs, and nothing else does."""


def role(rayservice: str | None = None) -> list[dict[str, Any]]:
    """The rules of the Role, in the namespace of the RayService; that one by its name where it is given."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for rule in RBAC:
        if rule.cluster_wide:
            continue
        entry = {"apiGroups": [rule.group], "resources": [rule.resource], "verbs": []}
        entry = merged.setdefault((rule.group, rule.resource), entry)
        entry["verbs"] += rule.verbs
        if rule.by_name and rayservice is not None:
            entry["resourceNames"] = [rayservice]
    return list(merged.values())


def cluster_role() -> list[dict[str, Any]]:
    """The rules of the ClusterRole; wanted only where a policy says `nodes`."""
    return [
        {"apiGroups": [rule.group], "resources": [rule.resource], "verbs": list(rule.verbs)}
        for rule in RBAC
        if rule.cluster_wide
    ]

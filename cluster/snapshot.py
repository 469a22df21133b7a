"""The answers of `/v1/cluster` and `/health`, from what the Directory knows: pure, one dict out.

Knows no HTTP, no Serve and no clock. Numbers nobody has reported yet are null, never zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import HOME_POOL, ExpertsSpec, deployment_name
from cluster.decisions import PolicyReport
from cluster.membership import Replica, State, View
from cluster.placement import Experts, Placement
from cluster.stats import REASON_CHARS, ReplicaStats, RouterStats, StartFailure

TRANSPORTS = ("stream", "object_store")
ROUTER = "router"
"""What stands for all routers where groups go by their names."""

Failures = Mapping[str, Sequence[StartFailure]]
"""Group, or `ROUTER` -> the last starts that failed since the last that succeeded, oldest first."""


@dataclass(frozen=True)
class ClusterFacts:
    """What a deployment fixes at its start.

    digest: the model digest in hex. experts: group -> layer -> expert ids.
    configured: group -> deployment -> replicas asked for. emulated_rows_per_s: pool -> speed, emulated pools only.
    required: the groups without which no request can be answered. elastic: somebody scales groups or routers.
    """

    model: str
    digest: str
    experts: Mapping[str, Experts]
    configured: Mapping[str, Mapping[str, int]]
    emulated_rows_per_s: Mapping[str, float]
    required: tuple[str, ...]
    elastic: bool = False


def cluster_facts(
    model: str, digest: str, placement: Placement, spec: ExpertsSpec, elastic_routers: bool = False
) -> ClusterFacts:
    """The facts of one configuration. With the local transport routers hold every expert and no group is deployed."""
    local = spec.transport == "local"
    pools = () if local else (HOME_POOL, *spec.pools)
    emulated = {HOME_POOL: spec.emulate, **{name: pool.emulate for name, pool in spec.pools.items()}}
    return ClusterFacts(
        model=model,
        digest=digest,
        experts=dict(zip(spec.group_names, placement.groups, strict=True)),
        configured={
            group: {deployment_name(group, pool): spec.replicas_of(group, pool) for pool in pools}
            for group in spec.group_names
        },
        emulated_rows_per_s={pool: spec.rows_per_s for pool, spec in emulated.items() if spec is not None},
        required=() if local else spec.group_names,
        elastic=elastic_routers or (spec.elastic and not local),
    )


def health(facts: ClusterFacts, view: View, routers: Collection[RouterStats]) -> tuple[bool, list[str]]:
    """Whether requests can be answered, and by name what is missing: a router, or a group with no ready replica.

    Replicas and routers of another model digest do not count, unless they are all that a request needs: while a new
    version starts, the old one still answers, with replicas that have been told to stop but wait for their routers.
    """
    ours = [router for router in routers if router.digest in ("", facts.digest)]
    missing = [*([] if ours else [ROUTER]), *view.of(facts.digest).missing(facts.required)]
    old = [router for router in routers if router.digest not in ("", facts.digest)]
    if missing and any(_answers(router, view) for router in old):
        return True, []
    return not missing, missing


def ready_replicas(facts: ClusterFacts, view: View, routers: Collection[RouterStats]) -> dict[str, int]:
    """Group -> replicas that requests can be answered with, by the rule of `health`: 0 is a group that it misses.

    While a whole old version answers, its replicas stand in for those that do not serve yet. A group that the old one
    does not have is left out until somebody serves it, since nobody misses it.
    """
    ready = {group: len(view.of(facts.digest).ready(group)) for group in facts.required}
    if not all(ready.values()) and health(facts, view, routers)[0]:
        old = {r.digest for r in routers if r.digest not in ("", facts.digest) and _answers(r, view)}
        serving = Counter(r.group for digest in old for r in _serving(view, digest))
        ready = {group: count or serving[group] for group, count in ready.items() if count or serving[group]}
    return ready


def _answers(router: RouterStats, view: View) -> bool:
    """Whether somebody serves every group of a router of an old version."""
    return {replica.group for replica in _serving(view, router.digest)} >= set(router.groups)


def _serving(view: View, digest: str) -> list[Replica]:
    """Those that old routers are answered by: replicas told to stop wait for them."""
    return [replica for replica in view.of(digest).replicas if replica.state is not State.JOINING]


def reasons(failures: Failures) -> dict[str, str]:
    """What could not start -> why, of the last attempt."""
    return {part: failed[-1].reason[:REASON_CHARS] for part, failed in sorted(failures.items()) if failed}


def cluster_snapshot(
    facts: ClusterFacts,
    view: View,
    stats: Mapping[str, ReplicaStats],
    routers: Sequence[RouterStats],
    transport_bytes: Mapping[str, int],
    targets: Mapping[str, int],
    policy: PolicyReport | None = None,
    failures: Failures | None = None,
) -> dict[str, Any]:
    """The body of `/v1/cluster`, ready for JSON.

    stats: replica id -> its last report. transport_bytes: transport -> bytes of all routers, gone ones included.
    targets: deployment -> replicas Serve is working towards; the configured number stands in for what it lacks.
    policy: what the autoscaler last said; None where there is none.
    """
    failed = {part: [each.as_json() for each in listed] for part, listed in (failures or {}).items()}
    shares = critical_shares(routers)
    return {
        "model": facts.model,
        "digest": facts.digest,
        "epoch": {"incarnation": view.epoch.incarnation, "n": view.epoch.n},
        "transport_bytes": dict.fromkeys(TRANSPORTS, 0) | dict(sorted(transport_bytes.items())),
        "groups": [
            {
                "name": group,
                "experts": {str(layer): list(ids) for layer, ids in sorted(experts.items())},
                "target_replicas": sum(targets.get(name, n) for name, n in facts.configured[group].items()),
                "replicas": [
                    _replica(facts, replica, stats.get(replica.id), shares.get(group))
                    for replica in view.replicas
                    if replica.group == group
                ],
                "failures": failed.get(group, []),
            }
            for group, experts in facts.experts.items()
        ],
        "routers": [
            {
                "id": router.id,
                "running": router.running,
                "waiting": router.waiting,
                "kv_used_tokens": router.kv_used_tokens,
                "tokens_generated": router.tokens_generated,
                "preemptions": router.preemptions,
                "ttft_p95_ms": _milliseconds(router.ttft_p95_ms),
                "tpot_p95_ms": _milliseconds(router.tpot_p95_ms),
                **_other_model(facts, router.digest),
            }
            for router in sorted(routers, key=lambda router: router.id)
        ],
        "router_failures": failed.get(ROUTER, []),
        "decisions": [decision.as_json() for decision in policy.decisions] if policy else [],
        "policy": policy.as_json() if policy else None,
    }


def critical_shares(routers: Collection[RouterStats]) -> dict[str, float]:
    """Group -> mean critical share over the routers that ran steps in their last interval."""
    seen: dict[str, list[float]] = {}
    for router in routers:
        for group, share in router.critical_share.items():
            seen.setdefault(group, []).append(share)
    return {group: sum(shares) / len(shares) for group, shares in seen.items()}


def _replica(
    facts: ClusterFacts, replica: Replica, stats: ReplicaStats | None, critical_share: float | None
) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": replica.id,
        "state": replica.state.value,
        "pool": replica.pool,
        "node": replica.address.node,
        "rows": stats.rows if stats else None,
        "utilization": round(stats.utilization, 4) if stats else None,
        "critical_share": None if critical_share is None else round(critical_share, 4),
        "speed_rows_per_s": round(replica.speed_rows_per_s, 1),
    }
    rows_per_s = facts.emulated_rows_per_s.get(replica.pool)
    if rows_per_s is not None:
        shown |= {"emulated": True, "emulated_rows_per_s": rows_per_s}
    return shown | _other_model(facts, replica.digest)


def _milliseconds(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _other_model(facts: ClusterFacts, digest: str) -> dict[str, str]:
    """What marks a part of another version, which goes as soon as nothing needs it any more; for ours nothing."""
    return {} if digest in ("", facts.digest) else {"other_digest": digest}

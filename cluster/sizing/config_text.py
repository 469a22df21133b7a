"""The config that puts a plan into force, and its placement file. Pure.

Nodes are found by a label that they are started with (`ray start --labels gpu=h100`), because Ray names accelerators of
data centres only. The kind with most memory that holds experts is the pool `default`, each other a pool of its name.
"""

from __future__ import annotations

from typing import Any

import yaml

from cluster.config import ExpertsSpec
from cluster.placement import Placement
from cluster.placement.files import placement_text
from cluster.sizing.fit import Conditions, SizingPlan
from cluster.sizing.shape import Shape


def placement_of(shape: Shape, plan: SizingPlan) -> Placement:
    """The groups of the plan as a placement, checked to hold every expert once."""
    return Placement(dict(shape.experts), tuple(group.experts for group in plan.groups))


def placement_file(shape: Shape, plan: SizingPlan, about: str) -> str:
    """What `experts.placement` of strategy explicit takes, as JSON."""
    return placement_text(placement_of(shape, plan), [about], as_json=True)


def config_text(
    plan: SizingPlan, conditions: Conditions, *, model: str, dtype: str, placement: str, label: str, about: str
) -> str:
    """The file that `serve deploy` takes, open to the head alone. model, placement: paths as the nodes know them."""
    args = {
        "model": {"path": model, "dtype": dtype},
        "experts": _experts(plan, placement, label),
        "router": {
            "replicas": conditions.work.routers,
            "max_batch_tokens": conditions.work.batch_tokens,
            "max_sequences": conditions.work.sequences,
            "kv_tokens": conditions.work.kv_tokens,
            "resources": _resources(label, plan.router_pool),
        },
    }
    application = {
        "name": "expertscale",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": args,
    }
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }
    return f"# {about}\n" + yaml.safe_dump(document, sort_keys=False, width=120)


def _experts(plan: SizingPlan, placement: str, label: str) -> dict[str, Any]:
    names = list(dict.fromkeys(pool for group in plan.groups for pool in group.replicas))
    home, *others = names
    by_pool = {
        pool: {f"experts-{number}": group.replicas.get(pool, 0) for number, group in enumerate(plan.groups)}
        for pool in names
    }
    most = max(count for counts in by_pool.values() for count in counts.values())
    experts: dict[str, Any] = {
        "groups": len(plan.groups),
        "placement": {"strategy": "explicit", "file": placement},
        "transport": "stream",
        "host": "node",
        "replicas": {name: count for name, count in by_pool[home].items() if count != 1} or 1,
        "resources": _resources(label, home),
    }
    if most > ExpertsSpec().max_replicas_hard:
        experts["max_replicas_hard"] = most
    if others:
        experts["pools"] = {
            pool: {
                "resources": _resources(label, pool),
                "replicas": {name: count for name, count in by_pool[pool].items() if count},
            }
            for pool in others
        }
    return experts


def _resources(label: str, pool: str) -> dict[str, Any]:
    return {"num_cpus": 1, "num_gpus": 1, "label_selector": {label: pool}}

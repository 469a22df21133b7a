"""What KubeRay does when a RayService changes: the running cluster goes on, or a second one is built beside it.

The operator compares hashes of `rayClusterConfig`, leaving out counts of worker groups: a change of counts alone is not
carried over to the running cluster. Groups appended at the end are, and with them the whole new config: spec and
annotations of the running cluster are replaced. Everything else makes a new one. Written from KubeRay's documentation
and source as of 1.7; no operator runs here.
"""

from __future__ import annotations

import copy
from typing import Any

COUNTS = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
"""What is left out of the comparison."""


def new_cluster_because(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why the change from `old` to `new`, two RayServices, builds a new cluster; empty where it does not."""
    before, after = _compared(old), _compared(new)
    groups, wanted = before.pop("workerGroupSpecs"), after.pop("workerGroupSpecs")
    reasons = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    for index, group in enumerate(groups):
        name = group["groupName"]
        if index >= len(wanted):
            reasons.append(f"worker group {name} is gone")
        elif wanted[index]["groupName"] != name:
            reasons.append(f"worker group {index} was {name} and is {wanted[index]['groupName']}")
        else:
            keys = sorted({*group, *wanted[index]})
            reasons += [f"{name}.{key}" for key in keys if group.get(key) != wanted[index].get(key)]
    return reasons


def not_carried_over(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Counts of groups in both that differ: the running cluster keeps the old ones until they are changed there.

    None where groups are appended: then all counts are the new values', whatever the running cluster had.
    """
    if appends(old, new):
        return []
    old_groups = {group["groupName"]: group for group in _cluster(old)["workerGroupSpecs"]}
    new_groups = {group["groupName"]: group for group in _cluster(new)["workerGroupSpecs"]}
    return [
        f"{name}.{key}"
        for name in old_groups.keys() & new_groups.keys()
        for key in COUNTS
        if old_groups[name].get(key) != new_groups[name].get(key)
    ]


def appends(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether `new` has groups behind those of `old`: the running cluster's spec is then replaced by the new one's."""
    return len(_cluster(new)["workerGroupSpecs"]) > len(_cluster(old)["workerGroupSpecs"])


def _cluster(service: dict[str, Any]) -> dict[str, Any]:
    cluster: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return cluster


def _compared(service: dict[str, Any]) -> dict[str, Any]:
    cluster = copy.deepcopy(_cluster(service))
    for group in cluster["workerGroupSpecs"]:
        for key in COUNTS:
            group.pop(key, None)
    return cluster

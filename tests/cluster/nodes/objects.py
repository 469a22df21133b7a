"""Objects as KubeRay and a cloud make them, and a kubeconfig that names the double."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def worker_group(
    name: str,
    least: int = 0,
    most: int = 4,
    *,
    gpus: int = 1,
    type_: str | None = None,
    price: str | None = None,
    replicas: int | None = None,
    node_selector: dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A worker group of pods with so many GPUs and 8 CPUs."""
    labels = {"ray.io/accelerator-type": type_} if type_ else {}
    labels |= {"expertscale.io/price-per-hour": price} if price else {}
    limits = {"cpu": "8", "memory": "32Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    pod = {"containers": [{"name": "ray", "image": "ray", "resources": {"limits": limits}}]}
    return {
        "groupName": name,
        "minReplicas": least,
        "maxReplicas": most,
        "replicas": least if replicas is None else replicas,
        "rayStartParams": {},
        "labels": labels,
        "template": {"spec": pod | ({"nodeSelector": node_selector} if node_selector else {})},
        **more,
    }


def raycluster(name: str, *groups: dict[str, Any], owner: str | None = "demo", grows: bool = True) -> dict[str, Any]:
    owners = [{"apiVersion": "ray.io/v1", "kind": "RayService", "name": owner, "uid": "u", "controller": True}]
    head = {
        "rayStartParams": {"num-cpus": "0"},
        "template": {"spec": {"containers": [{"name": "ray", "image": "ray"}]}},
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, **({"ownerReferences": owners} if owner else {})},
        "spec": {
            "rayVersion": "2.60.0",
            "enableInTreeAutoscaling": grows,
            "headGroupSpec": head,
            "workerGroupSpecs": list(groups),
        },
    }


def rayservice(name: str, active: str | None, pending: str | None = None) -> dict[str, Any]:
    status = {
        key: {"rayClusterName": cluster}
        for key, cluster in (("activeServiceStatus", active), ("pendingServiceStatus", pending))
        if cluster
    }
    made = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": name}, "spec": {}, "status": status}
    made["spec"] = {"rayClusterConfig": raycluster("x")["spec"]}
    return made


def node(name: str, gpus: int = 1, *, ready: bool = True, closed: bool = False, **labels: str) -> dict[str, Any]:
    """labels: `__` stands for `/`, `_` for `-`, `DOT` for `.`."""
    written = {key.replace("DOT", ".").replace("__", "/").replace("_", "-"): value for key, value in labels.items()}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": written},
        "spec": {"unschedulable": True} if closed else {},
        "status": {
            "allocatable": {"cpu": "15800m", "memory": "60Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
            "conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}],
        },
    }


def kubeconfig(folder: Path, url: str) -> Path:
    """A file by which the Python client and kubectl find the double."""
    path = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "double",
        "contexts": [{"name": "double", "context": {"cluster": "double", "user": "nobody", "namespace": "prod"}}],
        "clusters": [{"name": "double", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {"token": "t"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path

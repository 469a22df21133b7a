"""Worker groups of a RayCluster and nodes of a Kubernetes cluster, read off the API's objects as they are. Pure.

What one machine of a worker group offers is what KubeRay tells Ray, in its order: `resources` of the group, then
`rayStartParams`, then the limits, else the requests, of its first container. Which labels it has are the group's own.
Kubernetes finds nodes by other numbers: what all containers of a pod request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.nodes.offers import ACCELERATOR_LABEL, PRICE_LABEL, ROUNDING, Offer

UNBOUNDED = 2**31 - 1
"""KubeRay's own default of `maxReplicas`."""
HEAD = "head"

_ACCELERATOR_LABELS = (
    "expertscale.io/gpu",
    ACCELERATOR_LABEL,
    "nvidia.com/gpu.product",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "aliyun.accelerator/nvidia_name",
    "node.kubernetes.io/instance-type",
)
_POOL_LABELS = (
    "expertscale.io/pool",
    "eks.amazonaws.com/nodegroup",
    "karpenter.sh/nodepool",
    "alibabacloud.com/nodepool-id",
    "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool",
)
_SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Room:
    """What a pod requests, or a node has for pods."""

    gpus: float
    cpus: float
    memory_bytes: float

    def fit(self, pod: Room) -> int:
        """How many such pods have room here; 0 of those that request nothing, too."""
        pairs = (self.gpus, pod.gpus), (self.cpus, pod.cpus), (self.memory_bytes, pod.memory_bytes)
        return min((int(there / each + ROUNDING) for there, each in pairs if each > ROUNDING), default=0)


@dataclass(frozen=True)
class WorkerGroup:
    """One worker group, or the head. gpus, cpus: of one replica of it, all its hosts together. pod: of one host.

    minimum, maximum, replicas: as the RayCluster says. most: how many there can be. index: in `workerGroupSpecs`;
    None for the head. price_per_hour: None where no label says it. node_selector: of its pods.
    """

    name: str
    index: int | None
    minimum: int
    maximum: int
    replicas: int
    most: int
    gpus: float
    cpus: float
    pod: Room
    hosts: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    price_per_hour: float | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)

    @property
    def offer(self) -> Offer:
        """Its machines, as something replicas can run on."""
        return Offer(self.name, self.most, self.gpus, self.cpus, self.labels)

    def as_json(self) -> dict[str, Any]:
        """As `/v1/cluster` shows it."""
        return {
            "name": self.name,
            "type": self.labels.get(ACCELERATOR_LABEL),
            "gpus_each": self.gpus,
            "replicas": self.replicas,
            "min_replicas": self.minimum,
            "max_replicas": self.maximum,
            "price_per_hour": self.price_per_hour,
        }


@dataclass(frozen=True)
class Node:
    """One node of the Kubernetes cluster. room: what it has for pods. usable: ready, and open for new pods."""

    name: str
    labels: Mapping[str, str]
    room: Room
    usable: bool


@dataclass(frozen=True)
class NodePool:
    """GPU nodes alike: of one pool of the cloud, with one type of GPU and one price."""

    name: str | None
    type: str | None
    price_per_hour: float | None
    nodes: int
    usable: int
    gpus: float

    def as_json(self) -> dict[str, Any]:
        """As `/v1/cluster` shows it. gpus: allocatable ones of the usable nodes."""
        return {
            "name": self.name,
            "type": self.type,
            "nodes": self.nodes,
            "usable": self.usable,
            "gpus": self.gpus,
            "price_per_hour": self.price_per_hour,
        }


def worker_groups(raycluster: Mapping[str, Any]) -> tuple[WorkerGroup, ...]:
    """The head, if replicas can run there, and the worker groups in their order.

    Without Ray's autoscaler there are as many as `replicas` says, or the minimum.
    """
    spec = raycluster.get("spec") or {}
    grows = bool(spec.get("enableInTreeAutoscaling"))
    head = _group(spec.get("headGroupSpec") or {}, HEAD, None, grows=False)
    listed = [head] if head.gpus or head.cpus else []
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        listed.append(_group(group, str(group.get("groupName")), index, grows))
    return tuple(listed)


def node_of(node: Mapping[str, Any]) -> Node:
    """What matters of a node object."""
    metadata, status = node.get("metadata") or {}, node.get("status") or {}
    allocatable = status.get("allocatable") or {}
    ready = any(each.get("type") == "Ready" and each.get("status") == "True" for each in status.get("conditions") or [])
    return Node(
        name=str(metadata.get("name")),
        labels=dict(metadata.get("labels") or {}),
        room=_room(allocatable),
        usable=ready and not (node.get("spec") or {}).get("unschedulable"),
    )


def node_pools(nodes: Iterable[Node]) -> tuple[NodePool, ...]:
    """Nodes that have GPUs, those alike as one."""
    found: dict[tuple[str | None, str | None, float | None], list[Node]] = {}
    for node in nodes:
        if node.room.gpus > 0:
            kind = _first(node.labels, _POOL_LABELS), _first(node.labels, _ACCELERATOR_LABELS), price_of(node.labels)
            found.setdefault(kind, []).append(node)
    return tuple(
        NodePool(
            *kind, len(alike), sum(node.usable for node in alike), sum(node.room.gpus for node in alike if node.usable)
        )
        for kind, alike in sorted(found.items(), key=lambda pair: tuple(map(str, pair[0])))
    )


def offers(groups: Iterable[WorkerGroup], nodes: Iterable[Node] | None = None) -> tuple[Offer, ...]:
    """What the worker groups offer; with `nodes` no more than these have room for by requests and selectors of pods.

    Groups that share nodes offer all of them each: `capacity` counts them once. Taints, affinities and what others run
    there are not looked at.
    """
    if nodes is None:
        return tuple(group.offer for group in groups)
    usable = [node for node in nodes if node.usable]
    return tuple(_offer_by_nodes(group, usable) for group in groups)


def _offer_by_nodes(group: WorkerGroup, nodes: Iterable[Node]) -> Offer:
    suiting = (node for node in nodes if group.node_selector.items() <= node.labels.items())
    pods = {node.name: fit for node in suiting if (fit := node.room.fit(group.pod))}
    most = min(group.most, sum(pods.values()) // group.hosts)
    return replace(group.offer, most=most, pods=pods, hosts=group.hosts)


def price_of(labels: Mapping[str, str]) -> float | None:
    """What the price label says; None where there is none, or it is no price."""
    try:
        price = float(labels.get(PRICE_LABEL, ""))
    except ValueError:
        return None
    return price if math.isfinite(price) and price >= 0 else None


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number: "500m" -> 0.5. What is none counts as 0, as an absent one does."""
    text = str(text).strip() if text is not None else ""
    digits = text.rstrip("kmKMGTi")
    try:
        value = float(digits) * _SUFFIXES[text[len(digits) :]]
    except (KeyError, ValueError):
        return 0.0
    return value if math.isfinite(value) and value >= 0 else 0.0


def _group(spec: Mapping[str, Any], name: str, index: int | None, grows: bool) -> WorkerGroup:
    pod = (spec.get("template") or {}).get("spec") or {}
    hosts = max(1, _count(spec.get("numOfHosts"), 1))
    labels = {str(key): str(value) for key, value in (spec.get("labels") or {}).items()}
    minimum, maximum = _count(spec.get("minReplicas"), 0), _count(spec.get("maxReplicas"), UNBOUNDED)
    replicas = max(minimum, _count(spec.get("replicas"), minimum))
    if index is None:
        minimum = maximum = replicas = 1
    gpus, cpus = _resources(spec, pod)
    requested = _requested(pod)
    return WorkerGroup(
        name=name,
        index=index,
        minimum=minimum,
        maximum=maximum,
        replicas=replicas,
        most=0 if spec.get("suspend") else maximum if grows else replicas,
        gpus=hosts * gpus,
        cpus=hosts * cpus,
        # What is not requested counts as Ray counts it.
        pod=Room(requested.gpus or gpus, requested.cpus or cpus, requested.memory_bytes),
        hosts=hosts,
        labels=labels,
        price_per_hour=price_of(labels),
        node_selector=dict(pod.get("nodeSelector") or {}),
    )


def _resources(spec: Mapping[str, Any], pod: Mapping[str, Any]) -> tuple[float, float]:
    """(GPUs, CPUs) of one pod, as Ray will know them."""
    stated, started = spec.get("resources") or {}, spec.get("rayStartParams") or {}
    container = (pod.get("containers") or [{}])[0].get("resources") or {}
    limits, requests = container.get("limits") or {}, container.get("requests") or {}
    gpus = _stated(stated.get("GPU"), started.get("num-gpus"))
    cpus = _stated(stated.get("CPU"), started.get("num-cpus"))
    if cpus is None:
        # Ray counts whole CPUs, rounded up, as KubeRay tells them.
        cpus = float(math.ceil(quantity(limits.get("cpu", requests.get("cpu"))) - 1e-9))
    return _gpus(limits) if gpus is None else gpus, cpus


def _requested(pod: Mapping[str, Any]) -> Room:
    """What Kubernetes finds a node for: all containers together, or one init container if that requests more."""
    together = [_request(container) for container in pod.get("containers") or []]
    alone = [_request(container) for container in pod.get("initContainers") or []]

    def most(of: Callable[[Room], float]) -> float:
        return max(sum(map(of, together)), max(map(of, alone), default=0.0))

    return Room(most(lambda room: room.gpus), most(lambda room: room.cpus), most(lambda room: room.memory_bytes))


def _request(container: Mapping[str, Any]) -> Room:
    """Of a container; what only its limits say is requested, too."""
    resources = container.get("resources") or {}
    return _room({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _room(amounts: Mapping[str, Any]) -> Room:
    return Room(_gpus(amounts), quantity(amounts.get("cpu")), quantity(amounts.get("memory")))


def _stated(*values: Any) -> float | None:
    return next((quantity(value) for value in values if value is not None), None)


def _gpus(resources: Mapping[str, Any]) -> float:
    return sum(quantity(amount) for name, amount in resources.items() if name.endswith("gpu"))


def _count(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _first(labels: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((labels[name] for name in names if name in labels), None)

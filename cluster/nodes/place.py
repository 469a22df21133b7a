"""Whether this is Kubernetes, and where in it we are: read off what KubeRay and the kubelet give every container.

Only environment and files are looked at; nothing is asked of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class Place:
    """A cluster to talk to. kubeconfig: how; None for the service account of this pod.

    rayservice: by name, None where it is to be found from our own RayCluster. own_cluster: the RayCluster this process
    runs in; None outside any.
    """

    namespace: str
    kubeconfig: str | None = None
    rayservice: str | None = None
    own_cluster: str | None = None


@dataclass(frozen=True)
class Elsewhere:
    """No cluster to talk to, and why."""

    reason: str


def find_place(
    environment: Mapping[str, str],
    *,
    kubeconfig: str | None = None,
    namespace: str | None = None,
    rayservice: str | None = None,
    account: Path = SERVICE_ACCOUNT,
) -> Place | Elsewhere:
    """Where we are. A kubeconfig that is given counts wherever that is; else the pod's own service account."""
    own = environment.get("RAY_CLUSTER_NAME") or None
    if kubeconfig is None:
        if not environment.get("KUBERNETES_SERVICE_HOST"):
            return Elsewhere("this is not Kubernetes, and the policy names no `kubernetes.kubeconfig`")
        if not (account / "token").is_file():
            return Elsewhere("this pod has no service account token mounted (automountServiceAccountToken)")
    if rayservice is None and own is None:
        return Elsewhere(
            "neither the policy's `kubernetes.rayservice` nor the variable RAY_CLUSTER_NAME says which cluster is ours"
        )
    return Place(namespace or _namespace_of(account), kubeconfig, rayservice, own)


def _namespace_of(account: Path) -> str:
    try:
        return (account / "namespace").read_text(encoding="utf-8").strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE

"""The parts of a policy file that speak of the cluster under it: whom to ask, and machines before a peak."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.config import Number, Spec

NamePattern = Annotated[str, Field(min_length=1, max_length=253)]
KubernetesName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]


class KubernetesSpec(Spec):
    """kubeconfig: the file that says how to reach the cluster; null: by this pod's service account, else not at all.

    namespace: of the RayService; null: that of the service account. rayservice: its name; null: the one that has made
    the RayCluster this runs in.
    """

    kubeconfig: Annotated[str, Field(min_length=1)] | None = None
    namespace: KubernetesName | None = None
    rayservice: KubernetesName | None = None


class PrewarmSpec(Spec):
    """lead_s: how long a machine takes to come. forecast: also before a peak that is only foreseen.

    worker_groups: patterns of the worker groups whose minReplicas may be raised.
    """

    lead_s: Annotated[Number, Field(ge=1, le=86400)]
    forecast: bool = True
    worker_groups: tuple[NamePattern, ...] = ("*",)

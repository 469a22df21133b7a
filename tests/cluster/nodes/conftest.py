"""A double of the Kubernetes API on loopback, asked by the real Python client, with the rights of `RBAC` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import cluster_role, role
from cluster.nodes.api import Api, connect
from cluster.nodes.place import Place
from tests.cluster.nodes.objects import kubeconfig
from tests.kube_double import KubernetesDouble, serve_double


@pytest.fixture
def double() -> Iterator[KubernetesDouble]:
    made, server = serve_double()
    made.allowed = role("demo") + cluster_role()
    yield made
    made.go_away()
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(double: KubernetesDouble, tmp_path: Path) -> Place:
    return Place("prod", str(kubeconfig(tmp_path, double.url)), "demo")


@pytest.fixture
def api(place: Place) -> Api:
    return connect(place)

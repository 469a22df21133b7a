"""Whether this is Kubernetes, by environment and files. Milliseconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.nodes import RBAC, cluster_role, role
from cluster.nodes.place import Elsewhere, Place, find_place
from tests.serving import ROOT

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RAY_CLUSTER_NAME": "demo-abcde"}


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("prod\n")
    return tmp_path


def test_in_a_pod_of_kuberay_everything_is_known(account: Path) -> None:
    assert find_place(POD, account=account) == Place("prod", None, None, "demo-abcde")
    assert find_place(POD, account=account, namespace="other", rayservice="demo") == Place(
        "other", None, "demo", "demo-abcde"
    )


def test_outside_it_is_off_unless_a_kubeconfig_is_named(tmp_path: Path) -> None:
    nowhere = find_place({}, account=tmp_path)
    assert isinstance(nowhere, Elsewhere)
    assert "not Kubernetes" in nowhere.reason
    assert find_place({}, account=tmp_path, kubeconfig="k", rayservice="demo") == Place("default", "k", "demo")


def test_what_is_missing_in_a_pod_is_told(account: Path, tmp_path: Path) -> None:
    unnamed = find_place({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, account=account)
    assert isinstance(unnamed, Elsewhere)
    assert "RAY_CLUSTER_NAME" in unnamed.reason
    tokenless = find_place(POD, account=tmp_path / "nothing")
    assert isinstance(tokenless, Elsewhere)
    assert "automountServiceAccountToken" in tokenless.reason


def test_outside_kubernetes_its_client_is_not_imported() -> None:
    code = (
        "import sys, cluster.nodes.keeper, autoscale.prewarming; "
        "assert not {m for m in sys.modules if m.split('.')[0] == 'kubernetes'}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_rights_are_as_few_as_can_be() -> None:
    assert role("demo") == [
        {"apiGroups": ["ray.io"], "resources": ["rayservices"], "verbs": ["get"], "resourceNames": ["demo"]},
        {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "patch"]},
    ]
    assert cluster_role() == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]}]
    assert all(rule.why for rule in RBAC)

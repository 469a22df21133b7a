"""Real kubectl against the same double: what an operator sees and does meets what the keeper does. Skips without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.nodes.keeper import READ_S, Keeper, Prewarm, Wish
from cluster.nodes.place import Place
from cluster.nodes.prewarm import ANNOTATION, Seat
from tests.cluster.nodes.objects import kubeconfig, raycluster, rayservice, worker_group
from tests.kube_double import KubernetesDouble, has_schemas

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kubectl(double: KubernetesDouble, tmp_path: Path) -> Kubectl:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed (Debian: kubernetes-client)")
    double.allowed = None
    config = kubeconfig(tmp_path, double.url)

    def run(*arguments: str, given: Any = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, "--kubeconfig", str(config), "--cache-dir", str(tmp_path / "cache"), *arguments],
            input=None if given is None else yaml.safe_dump(given),
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_prewarmed_cluster_as_an_operator_sees_and_changes_it(
    double: KubernetesDouble, kubectl: Kubectl, place: Place
) -> None:
    made = raycluster("demo-abcde", worker_group("l4", 1, 4))
    applied = kubectl("apply", "--validate=false", "-f", "-", given=made)
    assert applied.returncode == 0, applied.stderr
    double.put(rayservice("demo", "demo-abcde"))
    now = [0.0]
    keeper = Keeper(place, lambda: now[0])
    assert keeper.turn(Wish(prewarm=Prewarm((Seat("experts-0", 3, 1, 1),)))).troubles == ()
    shown = json.loads(kubectl("get", "raycluster", "demo-abcde", "-o", "json").stdout)
    assert shown["spec"]["workerGroupSpecs"][0]["minReplicas"] == 3
    assert json.loads(shown["metadata"]["annotations"][ANNOTATION]) == {"l4": {"found": 1, "set": 3}}

    patch = '[{"op": "replace", "path": "/spec/workerGroupSpecs/0/minReplicas", "value": 2}]'
    patched = kubectl("patch", "raycluster", "demo-abcde", "--type=json", "-p", patch)
    assert patched.returncode == 0, patched.stderr
    now[0] += READ_S
    assert keeper.turn(Wish(prewarm=Prewarm())).troubles == ()
    shown = json.loads(kubectl("get", "raycluster", "demo-abcde", "-o", "json").stdout)
    assert shown["spec"]["workerGroupSpecs"][0]["minReplicas"] == 2, "the operator's"
    assert ANNOTATION not in shown["metadata"]["annotations"]


@pytest.mark.parametrize("how", [(), ("--server-side",)])
def test_applying_twice_changes_nothing(double: KubernetesDouble, kubectl: Kubectl, how: tuple[str, ...]) -> None:
    made = raycluster("c", worker_group("l4", 1, 4))
    for _ in range(2):
        applied = kubectl("apply", "--validate=false", *how, "-f", "-", given=made)
        assert applied.returncode == 0, applied.stderr
    assert double.get("rayclusters", "c")["spec"] == made["spec"]


def test_the_double_refuses_what_the_schema_does_not_know(kubectl: Kubectl) -> None:
    if not has_schemas():
        pytest.skip("the schemas of KubeRay's resources (../shared/kuberay) are not here")
    wrong = raycluster("c", worker_group("l4") | {"minReplica": 1})
    refused = kubectl("create", "--validate=false", "-f", "-", given=wrong)
    assert refused.returncode != 0
    assert "minReplica" in refused.stderr

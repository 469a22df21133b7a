"""By the service account of a pod: token and authority as the kubelet mounts them, over TLS. The API is the double."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from kubernetes.config import incluster_config

from cluster.nodes import role
from cluster.nodes.keeper import Keeper, Prewarm, Wish
from cluster.nodes.place import Place, find_place
from cluster.nodes.prewarm import Seat
from tests.cluster.nodes.objects import raycluster, rayservice, worker_group
from tests.kube_double import KubernetesDouble, serve_double


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A service account's files, with an authority made for this test."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    authority = certify(tmp_path, "ca.crt")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "namespace").write_text("prod")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    return tmp_path


@pytest.fixture
def double(account: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesDouble]:
    made, server = serve_double((account / "ca.crt", account / "key"))
    made.allowed, made.token = role("demo"), "secret"
    made.put(rayservice("demo", "demo-abcde"))
    made.put(raycluster("demo-abcde", worker_group("l4", 1, 4)))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(urlparse(made.url).port))
    yield made
    made.go_away()
    server.shutdown()
    server.server_close()


def test_in_a_pod_of_kuberay_nothing_needs_to_be_said(double: KubernetesDouble, account: Path) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "RAY_CLUSTER_NAME": "demo-abcde"}
    place = find_place(environment, account=account)
    assert isinstance(place, Place)
    seen = Keeper(place, time.monotonic).turn(Wish(prewarm=Prewarm((Seat("experts-0", 2, 1, 1),))))
    assert seen.troubles == ()
    (group,) = double.get("rayclusters", "demo-abcde")["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] == 2


def test_a_token_that_is_not_valid_is_told(double: KubernetesDouble) -> None:
    double.token = "another"
    (trouble,) = Keeper(Place("prod", rayservice="demo"), time.monotonic).turn(Wish()).troubles
    assert "does not know who we are (401)" in trouble
    assert "secret" not in trouble


def test_a_server_of_another_authority_is_not_talked_to(double: KubernetesDouble, account: Path) -> None:
    certify(account, "ca.crt")
    (trouble,) = Keeper(Place("prod", rayservice="demo"), time.monotonic).turn(Wish()).troubles
    assert "does not answer" in trouble
    assert double.requests == []


def certify(folder: Path, name: str) -> Path:
    """A new authority that is its own server's certificate; its key is beside it."""
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(folder / "key"), "-out", str(folder / name)]
    subprocess.run(["openssl", *request.split(), *files], check=True, capture_output=True, timeout=60)
    return folder / name

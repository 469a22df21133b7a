"""Who may reach what: the policies applied as Kubernetes documents them, to pods labelled as in a real cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.helm.charts import RELEASE, Document, ci, merged, only, pods, render

FABRIC = 41234
"""Expert replicas take any free port."""
GCS, DASHBOARD, HTTP, METRICS, REDIS = 6379, 8265, 8000, 8080, 6379
VALUES = ci("mixed-gpu")


@dataclass(frozen=True)
class Peer:
    """A pod that connects: its labels, its namespace's labels, and whether it is in the release's namespace."""

    labels: dict[str, str]
    namespace: dict[str, str] = field(default_factory=dict)
    same_namespace: bool = False


def ray_pod(documents: list[Document], group: str, cluster: str = "mixed-x1y2z") -> Peer:
    """A pod of a worker group or the head. KubeRay adds labels of its own, and takes the name label for itself."""
    own = pods(only(documents, "RayService"))[group]["metadata"]["labels"]
    labels = {**own, "app.kubernetes.io/name": "kuberay", "ray.io/cluster": cluster, "ray.io/node-type": "worker"}
    return Peer(labels, same_namespace=True)


STRANGER = Peer({"app": "web"}, same_namespace=True)
OTHER_RELEASE = Peer({"app.kubernetes.io/instance": "other", "app.kubernetes.io/component": "worker"}, {}, True)
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})


def allowed(documents: list[Document], target: Peer, port: int, source: Peer) -> bool:
    """May `source` connect to `port` of `target`? What no policy selects is open; what one selects needs a rule."""
    policies = [
        d for d in documents if d["kind"] == "NetworkPolicy" and selects(d["spec"]["podSelector"], target.labels)
    ]
    rules = [rule for policy in policies for rule in policy["spec"]["ingress"]]
    return not policies or any(_lets_in(rule, port, source) for rule in rules)


def _lets_in(rule: Document, port: int, source: Peer) -> bool:
    on_port = "ports" not in rule or any(entry["port"] == port for entry in rule["ports"])
    return on_port and ("from" not in rule or any(_is(peer, source) for peer in rule["from"]))


def _is(peer: Document, source: Peer) -> bool:
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], source.namespace):
            return False
    elif not source.same_namespace:
        return False
    return selects(peer.get("podSelector", {}), source.labels)


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """A label selector of Kubernetes; of its expressions only those the chart uses."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return render(VALUES)


@pytest.mark.parametrize("stranger", [STRANGER, OTHER_RELEASE, PROMETHEUS, OPERATOR])
@pytest.mark.parametrize("group", ["head", "a10g", "l4", "h100"])
def test_the_fabric_and_rays_ports_are_closed_to_strangers(
    documents: list[Document], group: str, stranger: Peer
) -> None:
    target = ray_pod(documents, group)
    for port in (FABRIC, GCS, 10001, 52365):
        assert not allowed(documents, target, port, stranger)
    if stranger is not OPERATOR:
        assert not allowed(documents, target, DASHBOARD, stranger)


def test_pods_of_the_release_reach_each_other_on_every_port(documents: list[Document]) -> None:
    """Also those of the second cluster during an upgrade: a router may meet experts of the old one."""
    everyone = [ray_pod(documents, group, cluster) for group in ("head", "a10g", "l4") for cluster in ("a", "b")]
    for target in everyone:
        for source in everyone:
            for port in (FABRIC, GCS, DASHBOARD, HTTP, 52365):
                assert allowed(documents, target, port, source)


def test_the_operator_and_prometheus_reach_what_they_need_and_no_more(documents: list[Document]) -> None:
    head, worker = ray_pod(documents, "head"), ray_pod(documents, "l4")
    assert allowed(documents, head, DASHBOARD, OPERATOR)
    assert allowed(documents, head, HTTP, OPERATOR)
    assert not allowed(documents, head, METRICS, OPERATOR)
    for target in (head, worker):
        assert allowed(documents, target, METRICS, PROMETHEUS)
        assert not allowed(documents, target, METRICS, STRANGER)
    assert allowed(documents, head, 44217, PROMETHEUS)


def test_the_api_is_open_to_holders_of_keys_unless_peers_are_named(documents: list[Document]) -> None:
    assert allowed(documents, ray_pod(documents, "a10g"), HTTP, STRANGER)
    gate = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}
    narrow = render(merged(VALUES, {"networkPolicy": {"http": {"from": [gate]}}}))
    router = ray_pod(narrow, "a10g")
    assert not allowed(narrow, router, HTTP, STRANGER)
    assert allowed(narrow, router, HTTP, Peer({}, {"kubernetes.io/metadata.name": "ingress"}))
    assert allowed(narrow, router, HTTP, OPERATOR)
    test_pod = only(narrow, "Pod")["metadata"]["labels"]
    assert allowed(narrow, router, HTTP, Peer(test_pod, same_namespace=True))


def test_redis_is_for_the_head_alone(documents: list[Document]) -> None:
    redis = Peer(only(documents, "StatefulSet")["spec"]["template"]["metadata"]["labels"], same_namespace=True)
    assert allowed(documents, redis, REDIS, ray_pod(documents, "head"))
    for source in (ray_pod(documents, "l4"), STRANGER, OPERATOR, PROMETHEUS):
        assert not allowed(documents, redis, REDIS, source)


def test_without_the_policy_everything_is_open_so_these_tests_can_fail() -> None:
    opened = render(merged(VALUES, {"networkPolicy": {"enabled": False}}))
    assert allowed(opened, ray_pod(opened, "l4"), FABRIC, STRANGER)
    assert RELEASE in ray_pod(opened, "l4").labels.values()

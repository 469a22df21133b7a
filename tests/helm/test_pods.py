"""What the pods are: without rights they do not need, found by what selects them, probed, and with the model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cluster import nodes
from tests.helm.charts import CI_FILES, NEEDED, Document, ci, merged, only, pods, ray_service, render
from tests.helm.test_network_policy import selects
from tests.serving import ROOT

CASES = {name.removesuffix("-values.yaml"): ci(name.removesuffix("-values.yaml")) for name in CI_FILES}
INGRESS: Document = {"enabled": True, "hosts": [{"host": "llm.example.com", "paths": [{"path": "/"}]}]}


def _specs(documents: list[Document]) -> list[Document]:
    """Pod specs of everything that runs pods."""
    found = [template["spec"] for template in pods(only(documents, "RayService")).values()]
    found += [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "StatefulSet"]
    return found + [d["spec"] for d in documents if d["kind"] == "Pod"]


def _containers(documents: list[Document]) -> list[Document]:
    return [c for spec in _specs(documents) for c in spec.get("initContainers", []) + spec["containers"]]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_nobody_is_root_and_only_volumes_can_be_written(values: Document) -> None:
    documents = render(values)
    for spec in _specs(documents):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    autoscaler = only(documents, "RayService")["spec"]["rayClusterConfig"].get("autoscalerOptions")
    for container in [*_containers(documents), *([autoscaler] if autoscaler else [])]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    for template in pods(only(documents, "RayService")).values():
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        writable = [mount["mountPath"] for mount in mounts if not mount.get("readOnly")]
        assert writable == ["/tmp"]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_mount_has_its_volume_and_every_volume_is_mounted(values: Document) -> None:
    for template in pods(ray_service(values)).values():
        spec = template["spec"]
        containers = spec.get("initContainers", []) + spec["containers"]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_only_the_head_has_a_token_for_the_api_server(values: Document) -> None:
    documents = render(values)
    templates = pods(only(documents, "RayService"))
    assert {group for group, t in templates.items() if t["spec"]["automountServiceAccountToken"]} == {"head"}
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    assert {t["spec"]["serviceAccountName"] for t in templates.values()} == accounts
    (subject,) = only(documents, "RoleBinding")["subjects"]
    assert subject["name"] == templates["head"]["spec"]["serviceAccountName"]


def _rules(document: Document) -> set[tuple[Any, ...]]:
    """(group, resource, verb, names) of a Role."""
    return {
        (group, resource, verb, tuple(rule.get("resourceNames", ())))
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_rights_are_those_of_pre_warming_and_of_the_inventory() -> None:
    documents = render(ci("mixed-gpu"))
    assert _rules(only(documents, "Role")) == {
        ("ray.io", "rayclusters", "get", ()),
        ("ray.io", "rayclusters", "patch", ()),
        ("ray.io", "rayservices", "get", ("mixed",)),
    }
    assert _rules(only(documents, "ClusterRole")) == {("", "nodes", "list", ()), ("", "nodes", "watch", ())}
    without = render(merged(ci("mixed-gpu"), {"rbac": {"listNodes": False}}))
    assert not [d for d in without if d["kind"].startswith("Cluster")]


def test_rights_are_exactly_what_cluster_nodes_says_it_asks_for() -> None:
    documents = render(ci("mixed-gpu"))
    assert _rules(only(documents, "Role")) == _rules({"rules": nodes.role("mixed")})
    assert _rules(only(documents, "ClusterRole")) == _rules({"rules": nodes.cluster_role()})


def test_probes_ask_what_answers_without_a_token() -> None:
    """Ray's token is asked for everywhere but at these paths; see `public_exact_paths` in Ray's dashboard."""
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group, template in pods(ray_service(ci("mixed-gpu"))).items():
        container = template["spec"]["containers"][0]
        names = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            get = container[probe]["httpGet"]
            if get["port"] == "serve":
                assert group != "head"
                assert (get["path"], names["serve"]) == ("/-/healthz", 8000)
            else:
                assert get["port"] == 52365
                assert get["path"] in PUBLIC_EXACT_PATHS


def test_monitor_finds_the_ports_of_head_and_workers() -> None:
    documents = render(ci("mixed-gpu"))
    monitor = only(documents, "PodMonitor")
    templates = pods(only(documents, "RayService"))
    ports = {group: {p["name"] for p in t["spec"]["containers"][0]["ports"]} for group, t in templates.items()}
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {"metrics", "as-metrics", "dash-metrics"}
    assert scraped <= ports["head"]
    assert all("metrics" in names for names in ports.values())
    for group, template in templates.items():
        kuberay = {"ray.io/node-type": "head" if group == "head" else "worker", "app.kubernetes.io/name": "kuberay"}
        assert selects(monitor["spec"]["selector"], {**template["metadata"]["labels"], **kuberay})


def test_budgets_cover_groups_with_pods_to_spare_and_say_a_number() -> None:
    """Kubernetes counts for pods that a custom resource owns only with `minAvailable` as a number."""
    documents = render(ci("mixed-gpu"))
    budgets = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"}
    assert {name: spec["minAvailable"] for name, spec in budgets.items()} == {"mixed-a10g": 1, "mixed-l4": 3}
    # Workers without Serve's proxy are never ready: counted as disrupted, they would make every drain wait for ever.
    assert {spec["unhealthyPodEvictionPolicy"] for spec in budgets.values()} == {"AlwaysAllow"}
    templates = pods(only(documents, "RayService"))
    for name, spec in budgets.items():
        selected = [g for g, t in templates.items() if selects(spec["selector"], t["metadata"]["labels"])]
        assert selected == [name.removeprefix("mixed-")]


def test_the_service_of_the_api_is_what_ingress_and_route_point_to() -> None:
    documents = render(merged(ci("mixed-gpu"), {"ingress": INGRESS, "serve": {"port": 8123}}))
    service = only(documents, "RayService")
    assert service["spec"]["serveService"]["spec"]["ports"] == [{"name": "serve", "port": 8123}]
    expected = {"name": "mixed-serve-svc", "port": 8123}
    (path,) = only(documents, "Ingress")["spec"]["rules"][0]["http"]["paths"]
    backend = path["backend"]["service"]
    assert {"name": backend["name"], "port": backend["port"]["number"]} == expected
    assert only(documents, "HTTPRoute")["spec"]["rules"][0]["backendRefs"] == [expected]
    assert pods(service)["head"]["spec"]["containers"][0]["ports"][-1] == {"name": "serve", "containerPort": 8123}


def test_the_model_comes_from_object_storage_before_ray_starts() -> None:
    for template in pods(ray_service(ci("aws"))).values():
        (fetch,) = template["spec"]["initContainers"]
        env = {variable["name"]: variable["value"] for variable in fetch["env"]}
        assert env["MODEL_URI"] == "s3://expertscale-models/mixtral"
        assert env["MODEL_DIR"] == "/models/checkpoint"
        assert {"name": "model", "mountPath": "/models"} in fetch["volumeMounts"]
        assert {"name": "model", "emptyDir": {"sizeLimit": "120Gi"}} in template["spec"]["volumes"]
        # So that Kubernetes puts no more copies on a node than its disk holds.
        assert template["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"] == "120Gi"


def test_room_for_the_model_is_asked_for_where_it_is_copied_unless_the_values_say_how_much() -> None:
    own: Document = {"head": {"resources": {"requests": {"ephemeral-storage": "50Gi"}}}}
    head = pods(ray_service(merged(ci("aws"), own)))["head"]["spec"]["containers"][0]
    assert head["resources"]["requests"]["ephemeral-storage"] == "50Gi"
    assert (
        head["resources"]["limits"]
        == pods(ray_service(ci("aws")))["head"]["spec"]["containers"][0]["resources"]["limits"]
    )
    assert "ephemeral-storage" not in str(pods(ray_service(ci("mixed-gpu"))))


def test_a_claim_of_the_charts_own_outlives_the_release() -> None:
    documents = render(ci("single-gpu"))
    claim = only(documents, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    head = pods(only(documents, "RayService"))["head"]
    expected = {"claimName": claim["metadata"]["name"], "readOnly": True}
    assert {"name": "model", "persistentVolumeClaim": expected} in head["spec"]["volumes"]


def test_redis_is_the_installed_one_or_the_one_that_is_named() -> None:
    bundled, named = render(ci("mixed-gpu")), render(ci("aws"))

    def options(documents: list[Document]) -> Document:
        return only(documents, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]

    service = next(d for d in bundled if d["kind"] == "Service")
    assert options(bundled)["redisAddress"] == f"{service['metadata']['name']}:6379"
    assert selects(
        {"matchLabels": service["spec"]["selector"]},
        only(bundled, "StatefulSet")["spec"]["template"]["metadata"]["labels"],
    )
    assert options(named)["redisAddress"].startswith("rediss://")
    assert not [d for d in named if d["kind"] in {"StatefulSet", "Service"}]
    assert "gcsFaultToleranceOptions" not in ray_service(NEEDED)["spec"]["rayClusterConfig"]


def test_traces_are_sent_where_the_values_say() -> None:
    values = merged(ci("mixed-gpu"), {"otel": {"sampler": "always_on", "headers": {"existingSecret": "h"}}})
    for template in pods(ray_service(values)).values():
        env = {variable["name"]: variable for variable in template["spec"]["containers"][0]["env"]}
        assert env["OTEL_EXPORTER_OTLP_ENDPOINT"]["value"] == "http://collector.observability:4318"
        assert env["OTEL_TRACES_SAMPLER"]["value"] == "always_on"
        reference = env["OTEL_EXPORTER_OTLP_HEADERS"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "h", "key": "headers"}


def test_a_groups_pod_spec_is_laid_over_what_the_chart_makes() -> None:
    group = pods(ray_service(ci("aws")))["l4"]["spec"]
    assert group["topologySpreadConstraints"][0]["maxSkew"] == 1
    assert group["nodeSelector"] == {"expertscale.io/pool": "l4", "expertscale.io/capacity": "spot"}
    assert [toleration["key"] for toleration in group["tolerations"]] == ["nvidia.com/gpu"]


@pytest.mark.parametrize("values", [*CASES.values(), NEEDED], ids=[*CASES, "the fewest values"])
def test_the_image_is_one_that_infra_docker_says_how_to_build(values: Document) -> None:
    built = set(re.findall(r"--tag expertscale:(\S+)", (ROOT / "infra" / "docker" / "README.md").read_text()))
    images = {template["spec"]["containers"][0]["image"] for template in pods(ray_service(values)).values()}
    assert {image.rpartition(":")[2] for image in images} <= built


def test_pods_are_the_user_of_the_image_and_the_smallest_example_finds_its_model_in_it() -> None:
    image = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    values = ci("minimal-cpu")
    context = pods(ray_service(values))["head"]["spec"]["securityContext"]
    assert set(re.findall(r"^USER (.+)$", image, re.MULTILINE)) == {f"{context['runAsUser']}:{context['runAsGroup']}"}
    copied = {word for line in re.findall(r"^COPY (infra/.+)$", image, re.MULTILINE) for word in line.split()}
    assert values["model"]["path"] in copied
    assert values["serve"]["experts"]["placement"]["file"] in copied

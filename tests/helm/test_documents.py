"""Every object of every ci file is valid against the strict schema of its kind; and these checks can fail."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from tests.helm import schemas
from tests.helm.charts import CHART, CI_FILES, NEEDED, Document, ci, merged, only, pods, ray_service, render, texts

EVERYTHING: Document = merged(
    ci("mixed-gpu"),
    {
        "head": {"podDisruptionBudget": True, "service": {"type": "ClusterIP", "annotations": {"a": "b"}}},
        "ingress": {"enabled": True, "className": "nginx", "hosts": [{"host": "h", "paths": [{"path": "/"}]}]},
        "networkPolicy": {"http": {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        "serviceAccount": {"annotations": {"role": "r"}},
        "env": [{"name": "A", "value": "1"}],
        "volumes": [{"name": "v", "emptyDir": {}}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "podLabels": {"team": "t"},
        "otel": {"sampler": "always_on", "samplerArg": "1", "headers": {"existingSecret": "s"}},
        "security": {"rayToken": {"existingSecret": "t"}},
        "imagePullSecrets": [{"name": "registry"}],
        "service": {"annotations": {"a": "b"}, "labels": {"l": "m"}},
        "rayService": {
            "upgradeType": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {"gatewayClassName": "g", "stepSizePercent": 10, "intervalSeconds": 5},
        },
        "extraObjects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-own"}},
            "apiVersion: v1\nkind: Secret\nmetadata: {name: x}\n",
        ],
    },
)
"""Nearly every switch of the chart turned."""

CASES = {name.removesuffix("-values.yaml"): ci(name.removesuffix("-values.yaml")) for name in CI_FILES}
CASES |= {"everything": EVERYTHING, "the fewest values": NEEDED}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_helm_lints_it_strictly(values: Document) -> None:
    report = helm_python.lint(CHART, values, strict=True, kube_version="v1.34.0")
    assert report["errors"] == []
    assert [m for m in report["messages"] if "icon is recommended" not in m["error"]] == []


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_object_is_valid_against_the_strict_schema_of_its_kind(values: Document) -> None:
    assert [fault for document in render(values) for fault in schemas.faults(document)] == []


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_pod_template_is_a_valid_pod(values: Document) -> None:
    """KubeRay's schema leaves the metadata of templates open and knows no required fields of pods."""
    for template in pods(ray_service(values)).values():
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        assert schemas.faults(pod) == []


def test_custom_kinds_are_judged_where_their_schemas_are_there() -> None:
    """The skips above are of this reason and no other."""
    if reason := schemas.missing_schemas():
        pytest.skip(reason)
    assert {document["kind"] for document in render(EVERYTHING)} >= {"RayService", "PodMonitor", "PrometheusRule"}


def _rename(node: Any, path: list[Any], new: str) -> None:
    for key in path[:-1]:
        node = node[key]
    node[new] = node.pop(path[-1])


WRONG_FIELDS: dict[str, tuple[str, list[Any], str]] = {
    "of the service": ("RayService", ["spec", "serveConfigV2"], "serveConfigV3"),
    "of the cluster": ("RayService", ["spec", "rayClusterConfig", "autoscalerOptions"], "autoscalingOptions"),
    "of a group": ("RayService", ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "maxReplicas"], "maximum"),
    "of a container": (
        "RayService",
        ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "image"],
        "imgae",
    ),
    "of a monitor": ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "port"], "prot"),
    "of a rule": ("PrometheusRule", ["spec", "groups", 0, "rules", 0, "expr"], "expression"),
    "of a policy": ("NetworkPolicy", ["spec", "podSelector"], "selector"),
    "of a stateful set": ("StatefulSet", ["spec", "serviceName"], "service"),
    "of a budget": ("PodDisruptionBudget", ["spec", "minAvailable"], "minimum"),
    "of an ingress": ("Ingress", ["spec", "rules", 0, "host"], "hosts"),
    "of a route": ("HTTPRoute", ["spec", "parentRefs"], "parents"),
    "of a role": ("Role", ["rules", 0, "verbs"], "verb"),
    "of an account": ("ServiceAccount", ["automountServiceAccountToken"], "automount"),
    "of a config map": ("ConfigMap", ["data"], "dta"),
}


@pytest.mark.parametrize(("kind", "path", "new"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_field_name_is_found(kind: str, path: list[Any], new: str) -> None:
    document = next(d for d in render(EVERYTHING) if d["kind"] == kind and path[0] in d)
    assert schemas.faults(document) == []
    _rename(document, path, new)
    assert any(new in fault or str(path[-1]) in fault for fault in schemas.faults(document))


def test_a_wrong_type_is_found() -> None:
    service = ray_service(EVERYTHING)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "1"
    assert any("minReplicas" in fault for fault in schemas.faults(service))


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_all_objects_are_in_the_namespace_and_named_once(values: Document) -> None:
    documents = render(values)
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    own = [d for d in documents if "helm.sh/chart" in d["metadata"].get("labels", {})]
    assert len(own) >= len(documents) - 2  # the two extra objects of `everything`
    assert {d["metadata"].get("namespace") for d in own if not d["kind"].startswith("Cluster")} == {"llm"}


def test_extra_objects_are_rendered_as_templates() -> None:
    only(render(EVERYTHING), "ConfigMap", "es-own")


def test_an_install_leaves_the_test_pod_to_helm_test() -> None:
    """Helm's own install, as far as it goes without a cluster."""
    release = helm_python.Config(storage_driver="memory").install(
        CHART, "es", ci("mixed-gpu"), namespace="llm", dry_run="client"
    )
    kinds = {document["kind"] for document in yaml.safe_load_all(str(release["manifest"])) if document}
    assert "RayService" in kinds
    assert "Pod" not in kinds
    assert kinds | {"Pod"} == {document["kind"] for document in render(ci("mixed-gpu"))}


def test_notes_hold_the_commands_to_try() -> None:
    notes = texts(ci("mixed-gpu"))["expertscale/templates/NOTES.txt"]
    for part in ("port-forward svc/mixed-serve-svc", "/v1/chat/completions", "Bearer $API_KEY", "patch raycluster"):
        assert part in notes


def test_the_packaged_chart_renders_the_same_without_the_repository(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    assert render(EVERYTHING, chart=archive) == render(EVERYTHING)

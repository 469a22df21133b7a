"""Whether the chart renders with what a Terraform module hands out, laid over the chart's example for that cloud.

And whether the two fit: deployments select the groups they are meant for, Secrets are those that READMEs make.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.infra.terraform.terraform_runs import ROOT

CHART = ROOT / "helm" / "expertscale"
EXAMPLES = {"aws": "aws-values.yaml", "alicloud": "alibaba-cloud-values.yaml"}
POOLS = {"aws": ["a10g", "a10g", "l4", "h100"], "alicloud": ["a10", "a10", "t4", "a100"]}
"""Of the router group and the expert groups, as the modules' defaults have them."""
PLACES = {"aws": {"experts": ["l4"], "router": ["router"]}, "alicloud": {"experts": ["a10"], "router": ["router"]}}
"""The groups that a deployment may run in, as the examples mean it."""


def check(cloud: str, handed: dict[str, Any]) -> None:
    """Assert that the chart renders with `handed`, and that it arrives where it should."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    values = merged(yaml.safe_load((CHART / "ci" / EXAMPLES[cloud]).read_text()), handed)
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="expertscale", namespace="expertscale")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each]
    metadata = [each["metadata"] for each in objects if each["kind"] == "ServiceAccount"]
    assert {each["name"]: each["annotations"] for each in metadata} == dict.fromkeys(
        ("expertscale-head", "expertscale-worker"), handed["serviceAccount"]["annotations"]
    )
    [service] = [each for each in objects if each["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == handed["gcsFaultTolerance"]["redis"]["address"]
    pods = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    assert [pod["nodeSelector"]["expertscale.io/pool"] for pod in pods] == POOLS[cloud]
    application = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert {name: _groups(cluster, application[name]["resources"]) for name in PLACES[cloud]} == PLACES[cloud]
    assert _secrets(objects) <= _made(cloud)
    assert all("nvidia.com/gpu" in [each["key"] for each in pod["tolerations"]] for pod in pods)


def _groups(cluster: dict[str, Any], resources: dict[str, Any]) -> list[str]:
    """The worker groups that have the labels which `resources` select."""
    wanted = resources["label_selector"].items()
    return [group["groupName"] for group in cluster["workerGroupSpecs"] if wanted <= group["labels"].items()]


def _secrets(node: Any) -> set[tuple[str, str | None]]:
    """(name, key) of every Secret that pods name, in all objects; no key where the whole Secret is meant."""
    found: set[tuple[str, str | None]] = set()
    for each in _maps(node):
        if "secretKeyRef" in each:
            found.add((each["secretKeyRef"]["name"], each["secretKeyRef"]["key"]))
        if "secretRef" in each:
            found.add((each["secretRef"]["name"], None))
        if isinstance(each.get("secret"), dict):
            found.add((each["secret"]["secretName"], None))
        found |= {(secret["name"], None) for secret in each.get("imagePullSecrets", ())}
    return found


def _maps(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _maps(each)


def _made(cloud: str) -> set[tuple[str, str | None]]:
    """(name, key) of the Secrets that the READMEs of chart and module make, and each of them without a key."""
    made: set[tuple[str, str | None]] = set()
    for readme in (CHART / "README.md", ROOT / "infra" / "terraform" / cloud / "README.md"):
        commands = re.sub(r"\\\n", " ", readme.read_text())
        for name, rest in re.findall(r"create secret generic (\S+)(.*)", commands):
            name = name.replace("RELEASE", "expertscale")
            made |= {(name, None), *((name, key) for key in re.findall(r"--from-\w+=([\w-]+)=", rest))}
    return made


def merged(below: Any, above: Any) -> Any:
    """Helm's rule: maps are merged, everything else is replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {name: merged(below.get(name), value) for name, value in above.items()}
    return above

"""Whether the chart renders with what a Terraform module hands out, laid over the chart's example for that cloud."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.infra.terraform.terraform_runs import ROOT

CHART = ROOT / "helm" / "expertscale"
EXAMPLES = {"aws": "aws-values.yaml", "alicloud": "alibaba-cloud-values.yaml"}
POOLS = {"aws": ["a10g", "a10g", "l4", "h100"], "alicloud": ["a10", "a10", "t4", "a100"]}
"""Of the router group and the expert groups, as the modules' defaults have them."""


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
    assert all("nvidia.com/gpu" in [each["key"] for each in pod["tolerations"]] for pod in pods)


def merged(below: Any, above: Any) -> Any:
    """Helm's rule: maps are merged, everything else is replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {name: merged(below.get(name), value) for name, value in above.items()}
    return above

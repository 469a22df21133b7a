"""What the chart's README and notes tell people to type is right."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.helm import schemas
from tests.helm.charts import CHART, NEEDED, ci, merged, ray_service, render, texts

README = (CHART / "README.md").read_text()


def test_its_example_values_render() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        render(merged(NEEDED, yaml.safe_load(example)))


def test_its_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (CHART / link).exists()] == []


@pytest.mark.parametrize("text", [README, texts(ci("mixed-gpu"))["expertscale/templates/NOTES.txt"]])
def test_its_patch_of_the_running_cluster_changes_one_count(text: str) -> None:
    """The RayCluster that KubeRay makes has the RayService's `rayClusterConfig` as its spec."""
    (patch,) = re.findall(r"-p '(\[.*?\])'", text)
    (operation,) = json.loads(patch)
    *path, key = operation["path"].strip("/").split("/")
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "c"},
        "spec": ray_service(ci("mixed-gpu"))["spec"]["rayClusterConfig"],
    }
    node = cluster
    for step in path:
        node = node[int(step)] if step.isdigit() else node[step]  # type: ignore[index,call-overload]
    assert operation["op"] == "replace"
    assert key == "maxReplicas"
    assert isinstance(node[key], int)
    node[key] = operation["value"]
    assert schemas.faults(cluster) == []


def test_its_secret_has_the_keys_that_the_examples_name() -> None:
    made = set(re.findall(r"--from-(?:file|literal)=([a-z-]+)=", README))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {values["security"][part]["key"] for part in ("apiKeys", "adminKeys", "clusterKey")}
    named.add(values["gcsFaultTolerance"]["redis"]["passwordSecret"]["key"])
    assert made == named

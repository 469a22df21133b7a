"""The chart as real Helm renders it: values in, documents out. Helm is the SDK's, in this process; no cluster is asked.

`render` returns Kubernetes objects with their template; what the chart refuses is raised as `Refused`.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tests.serving import ROOT

CHART = ROOT / "helm" / "expertscale"
CI_FILES = sorted(path.name for path in (CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "es", "llm"
Document = dict[str, Any]
NEEDED: Document = {
    "model": {"path": "/models/checkpoint"},
    "security": {"clusterKey": {"existingSecret": "s"}, "apiKeys": {"existingSecret": "s"}},
}
"""The fewest values with which the chart renders."""


class Refused(Exception):
    """The chart does not render with these values; the sentences it says."""


def ci(name: str) -> Document:
    """The values of a file in ci/, without the ending."""
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())


def merged(*parts: Document) -> Document:
    """Values laid over one another, as Helm does with several files: maps by key, everything else as a whole."""
    result: Document = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def texts(values: Document, *, chart: Path = CHART) -> dict[str, str]:
    """Template -> what it renders.

    Raises:
        Refused: by the schema or by a template.
    """
    with helm_python.Chart.load(chart) as loaded:
        try:
            loaded.validate_schema(values)
            return loaded.render(values, name=RELEASE, namespace=NAMESPACE)
        except (helm_python.HelmValuesError, helm_python.HelmRenderError) as error:
            raise Refused(str(error)) from None


def render(values: Document, *, chart: Path = CHART) -> list[Document]:
    """All Kubernetes objects, in the order of the templates' names."""
    return json.loads(_rendered(json.dumps(values), chart))


@cache
def _rendered(values: str, chart: Path) -> str:
    """As JSON, so that nobody changes what another test gets."""
    documents = [
        document
        for template, text in sorted(texts(json.loads(values), chart=chart).items())
        if not template.endswith("NOTES.txt")
        for document in yaml.load_all(text, yaml.CSafeLoader)
        if document is not None
    ]
    return json.dumps(documents)


def only(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The one object of a kind (and name)."""
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def ray_service(values: Document, *, chart: Path = CHART) -> Document:
    """The RayService that `values` render."""
    return only(render(values, chart=chart), "RayService")


def pods(service: Document) -> dict[str, Document]:
    """Group -> pod template, the head's first."""
    cluster = service["spec"]["rayClusterConfig"]
    templates = {"head": cluster["headGroupSpec"]["template"]}
    return templates | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}

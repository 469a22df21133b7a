"""Generated parts of the chart are up to date, and the generator tells when they are not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.helm.charts import CHART
from tests.serving import ROOT

GENERATOR = ROOT / "helm" / "generate.py"


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The generator, working on a copy of what it reads."""
    for folder in ("helm", "deployments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "threads.env", tmp_path)
    for folder in ("prometheus", "grafana"):
        if (ROOT / "infra" / folder).is_dir():
            shutil.copytree(ROOT / "infra" / folder, tmp_path / "infra" / folder)
    spec = importlib.util.spec_from_file_location("chart_generator", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path / "helm")
    monkeypatch.setattr(module, "CHART", tmp_path / "helm" / "expertscale")
    return module


def _stale(generator: ModuleType) -> list[str]:
    return [path.relative_to(generator.ROOT).as_posix() for path in generator.stale()]


def test_the_chart_is_up_to_date() -> None:
    """Otherwise run `python helm/generate.py`."""
    done = subprocess.run([sys.executable, str(GENERATOR), "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_changed_default_makes_the_readme_stale(generator: ModuleType) -> None:
    assert _stale(generator) == []
    values = generator.CHART / "values.yaml"
    values.write_text(values.read_text().replace("port: 8000", "port: 8001"))
    assert _stale(generator) == ["helm/expertscale/README.md"]
    assert generator.main([]) == 0
    assert "| `serve.port` | `8001` |" in (generator.CHART / "README.md").read_text()
    assert _stale(generator) == []


def test_a_changed_variable_or_rule_makes_its_copy_stale(generator: ModuleType) -> None:
    env = generator.ROOT / "deployments" / "serve.env"
    env.write_text(env.read_text() + "RAY_SERVE_NEW=1\n")
    rules = generator.ROOT / "infra" / "prometheus" / "own.yaml"
    rules.parent.mkdir(parents=True, exist_ok=True)
    rules.write_text("groups: []\n")
    (rules.parent / "prometheus.yaml").write_text("global: {}\nscrape_configs: []\n")  # no rules: not copied
    stray = generator.CHART / "files" / "prometheus" / "gone.yaml"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text("groups: []\n")
    folder = "helm/expertscale/files"
    assert _stale(generator) == [
        f"{folder}/prometheus/gone.yaml",
        f"{folder}/prometheus/own.yaml",
        f"{folder}/serve.env",
    ]
    assert generator.main([]) == 0
    assert _stale(generator) == []
    assert not stray.exists()


def test_a_value_without_a_comment_is_refused(generator: ModuleType) -> None:
    with pytest.raises(generator.OutOfDateError, match=r"a\.c has no"):
        generator.table("a:\n  # -- Good.\n  b: 1\n\n  c: 2\n")


def _objects(schema: Any, path: str = "") -> list[tuple[str, Any]]:
    """(path, schema) of every object in a JSON schema."""
    found = []
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            found.append((path, schema))
        for key, value in schema.items():
            found += _objects(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            found += _objects(value, f"{path}/{index}")
    return found


OPEN = {
    "/properties/global",
    "/properties/podSecurityContext",
    "/properties/securityContext",
    "/properties/volumes/items",
    "/properties/prometheusRule/properties/groups/items",
    "/$defs/peers/items/properties/podSelector",
    "/$defs/peers/items/properties/namespaceSelector",
    "/$defs/podSpec/properties/affinity",
    "/$defs/podSpec/properties/dnsConfig",
    "/$defs/podSpec/properties/topologySpreadConstraints/items",
}
"""Objects of Kubernetes that the chart passes on as they are; `schemas.faults` judges what is rendered of them."""


def test_every_object_of_the_schema_is_closed_or_said_to_be_open() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert {path for path, node in _objects(schema) if "additionalProperties" not in node} == OPEN


def test_every_default_has_a_place_in_the_schema_and_the_other_way_round() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(node: Any, value: Any, path: str) -> None:
        if "$ref" in node or not node.get("properties") or not value:
            return  # a map of the user's, or a part used in several places
        assert set(node["properties"]) - {"global"} == set(value), path
        for key, below in node["properties"].items():
            compare(below, value.get(key), f"{path}.{key}")

    compare(schema, values, "values")


def test_versions_agree_with_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["appVersion"] == package["version"]
    assert f"ray[serve]=={values['rayVersion']}" in package["dependencies"]

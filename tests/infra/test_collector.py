"""infra/otel/collector.yaml: readable, whole, and listening where README sends the spans. No collector runs here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def collector() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "otel" / "collector.yaml").read_text(encoding="utf-8"))
    return document


def test_the_pipeline_names_parts_that_are_here(collector: dict[str, Any]) -> None:
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert pipeline[kind]
        assert set(pipeline[kind]) <= collector[kind].keys()
    assert pipeline["processors"][0] == "memory_limiter"
    assert pipeline["processors"][-1] == "batch"


def test_it_listens_for_http_at_the_port_of_the_readme(collector: dict[str, Any]) -> None:
    [endpoint] = set(re.findall(r"OTEL_EXPORTER_OTLP_ENDPOINT=(\S+?)`", (ROOT / "README.md").read_text("utf-8")))
    assert endpoint.startswith("http://")
    protocols = collector["receivers"]["otlp"]["protocols"]
    assert protocols.keys() == {"http"}, "our processes refuse gRPC"
    assert protocols["http"]["endpoint"].rpartition(":")[2] == endpoint.rpartition(":")[2]

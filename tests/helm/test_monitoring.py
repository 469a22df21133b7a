"""Rules and dashboards travel inside the chart as they are, whatever braces they hold; what is not there is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helm import schemas
from tests.helm.charts import CHART, NEEDED, Document, Refused, merged, only, render

RULES: Document = {"groups": [{"name": "g", "rules": [{"alert": "A", "expr": "up == 0"}]}]}
ANNOTATED: Document = {
    "groups": [
        {
            "name": "expertscale",
            "rules": [
                {
                    "alert": "Slow",
                    "expr": 'rate(x{code=~"5.."}[5m]) > 0.1',
                    "for": "5m",
                    "annotations": {"summary": "{{ $labels.pod }} has {{ $value | humanize }}"},
                }
            ],
        }
    ]
}
DASHBOARD: Document = {"title": "ExpertScale", "panels": [{"legendFormat": '{{pod}} `a` "b"\n'}]}
ON: Document = merged(NEEDED, {"prometheusRule": {"enabled": True}, "grafana": {"dashboards": {"enabled": True}}})


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """A copy of the chart without rules and dashboards."""
    copy = tmp_path / "expertscale"
    shutil.copytree(CHART, copy)
    for folder in ("prometheus", "grafana"):
        shutil.rmtree(copy / "files" / folder, ignore_errors=True)
        (copy / "files" / folder).mkdir()
    return copy


def test_rules_and_dashboards_of_the_chart_are_passed_on_unchanged(chart: Path) -> None:
    (chart / "files" / "prometheus" / "a.yaml").write_text(yaml.safe_dump(RULES))
    (chart / "files" / "prometheus" / "b.yaml").write_text(yaml.safe_dump(ANNOTATED))
    (chart / "files" / "grafana" / "overview.json").write_text(json.dumps(DASHBOARD, indent=2))
    own = {"name": "own", "rules": [{"record": "r", "expr": "1"}]}
    documents = render(merged(ON, {"prometheusRule": {"groups": [own], "labels": {"release": "m"}}}), chart=chart)
    rule = only(documents, "PrometheusRule")
    assert rule["spec"]["groups"] == [*RULES["groups"], *ANNOTATED["groups"], own]
    assert rule["metadata"]["labels"]["release"] == "m"
    dashboards = only(documents, "ConfigMap", "es-expertscale-dashboards")
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(text) for name, text in dashboards["data"].items()} == {"overview.json": DASHBOARD}
    assert schemas.faults(dashboards) == []
    assert schemas.faults(rule) == []


def test_what_the_chart_was_packaged_without_is_refused(chart: Path) -> None:
    with pytest.raises(Refused) as refusal:
        render(ON, chart=chart)
    assert "prometheusRule.groups: this chart was packaged without rules" in str(refusal.value)
    assert "grafana.dashboards.enabled: this chart was packaged without dashboards" in str(refusal.value)


def test_the_shipped_rules_and_dashboards_are_valid_objects() -> None:
    shipped = {folder: sorted((CHART / "files" / folder).glob("*")) for folder in ("prometheus", "grafana")}
    if not any(shipped.values()):
        pytest.skip("infra/ has no rules and no dashboards yet")
    values = merged(
        NEEDED,
        {"prometheusRule": {"enabled": bool(shipped["prometheus"])}},
        {"grafana": {"dashboards": {"enabled": bool(shipped["grafana"])}}},
    )
    assert [fault for document in render(values) for fault in schemas.faults(document)] == []

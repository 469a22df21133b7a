"""The alert rules: valid, tested by promtool, about metrics that there are. Needs Debian's prometheus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.health_reasons import Reason
from cluster.metrics import METRICS
from tests.prometheus import promtool
from tests.serving import ROOT

FOLDER = ROOT / "infra" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
TESTS = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
SILENT = {
    "stalled signals": "SignalsStalled",
    "a policy that cannot be read": "PolicyFileUnusable",
    "a directory without updates": "DirectoryUpdatesMissing",
    "a group without a ready replica": "ExpertGroupWithoutReplica",
}


def test_promtool_finds_no_fault_with_config_and_rules() -> None:
    promtool("check", "config", str(FOLDER / "prometheus.yaml"))
    promtool("check", "rules", "--lint-fatal", str(FOLDER / "alerts.yaml"))


def test_promtool_s_unit_tests_pass() -> None:
    promtool("test", "rules", str(FOLDER / "alerts_test.yaml"))


@pytest.mark.parametrize("wrong", [("== 0", "== 7"), ("== 1", "== 7"), ("> 30", "> 9000"), ("for: 30s", "for: 20m")])
def test_rules_that_are_wrong_do_not_pass(tmp_path: Path, wrong: tuple[str, str]) -> None:
    (tmp_path / "alerts.yaml").write_text((FOLDER / "alerts.yaml").read_text().replace(*wrong))
    (tmp_path / "alerts_test.yaml").write_text((FOLDER / "alerts_test.yaml").read_text())
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", str(tmp_path / "alerts_test.yaml"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_each_alert_fires_and_ends_in_a_test_and_says_what_to_do(rule: dict[str, Any]) -> None:
    name = rule["alert"]
    checks = next(test for test in TESTS if test["name"] == name)["promql_expr_test"]
    assert [bool(check["exp_samples"]) for check in checks] == [False, True, False], (
        "not before its time, then, and over"
    )
    assert any(check["alertname"] == name for check in TESTS[0]["alert_rule_test"]), "quiet in a healthy cluster"
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert len(rule["annotations"]["runbook"]) > 60


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_each_alert_tells_clusters_apart(rule: dict[str, Any]) -> None:
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
    assert all(labels.startswith("namespace, ray_io_cluster, application") for labels in grouped)
    assert grouped or rule["alert"] == "NothingPublished"


def test_alerts_are_about_metrics_and_reasons_that_there_are() -> None:
    text = (FOLDER / "alerts.yaml").read_text() + (FOLDER / "alerts_test.yaml").read_text()
    named = set(re.findall(r"\bray_(expertscale_\w+)", text))
    assert named <= {metric.name for metric in METRICS}
    assert set(re.findall(r'degraded\{[^}]*reason="(\w+)"', text)) <= {reason.value for reason in Reason}


def test_the_readme_names_every_alert_and_every_reason() -> None:
    text = (FOLDER / "README.md").read_text()
    assert {rule["alert"] for rule in RULES} <= set(re.findall(r"\b[A-Z]\w+", text))
    assert {reason.value for reason in Reason} <= set(re.findall(r"`(\w+)`", text))
    assert {f"expertscale_{name}" for name in re.findall(r"`(\w+_(?:total|seconds|replicas|error))`", text)} <= {
        metric.name for metric in METRICS
    }


@pytest.mark.parametrize("what", SILENT)
def test_balancing_never_dies_silently(what: str) -> None:
    assert SILENT[what] in {rule["alert"] for rule in RULES}

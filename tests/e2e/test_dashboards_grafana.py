"""A real Prometheus on the elastic demo: every panel has data, a policy that breaks is seen everywhere. One cluster.

Prometheus scrapes with `infra/prometheus/prometheus.yaml`, but every second, from Ray's own file of targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
import pytest
import yaml

from cluster import metrics
from cluster.health_reasons import POLICY_SILENCE_S
from cluster.metrics import Metric
from deployments.directory_metering import RATE_WINDOW_S
from infra.grafana.panels import BOARDS
from tests.chaos.processes import Processes, stopped
from tests.e2e.conftest import WholeModel
from tests.e2e.elastic import Elastic, elastic_server
from tests.e2e.load import Load, references
from tests.prometheus import Prometheus, discovery_file, prometheus
from tests.serving import ROOT, wait_for

REPORT_S = 2
ENVIRONMENT = {"RAY_metrics_report_interval_ms": str(1000 * REPORT_S)}
FOLDER = ROOT / "infra" / "prometheus"
VARIABLES = {"$application": ".*", "$__rate_interval": "10s"}
SEEN_S = 30.0
APPLICATION = "expertscale"
HEARTBEAT_TIMEOUT_S = 10.0
"""Of `cluster.membership`: then the replica is missing, and the status is 503."""


@dataclass(frozen=True)
class Watched:
    """The demo, and the Prometheus that looks at it."""

    elastic: Elastic
    prometheus: Prometheus

    def values(self, expression: str) -> list[float]:
        """The numbers of an instant query; what is no number left out."""
        found = [float(each["value"][1]) for each in self.prometheus.query(filled(expression))]
        return [value for value in found if math.isfinite(value)]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {each["metric"]["alertname"] for each in self.prometheus.query('ALERTS{alertstate="firing"}')}


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def ours(metric: Metric) -> str:
    return f"max(ray_{metric.name})"


def scrape_config(folder: Path, targets: Path) -> Path:
    """The config that operators copy, with another file of targets and shorter times, and so its rules."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["for"] = "2s"
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yaml"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, whole_model: WholeModel) -> Iterator[Watched]:
    wanted, folder = references(whole_model.complete), tmp_path_factory.mktemp("grafana")
    with ExitStack() as stack:
        server = elastic_server(folder, lambda server: Load(server, wanted), environment=ENVIRONMENT)
        elastic = stack.enter_context(server)
        config = scrape_config(folder, discovery_file(elastic.server))
        watching = Watched(elastic, stack.enter_context(prometheus(config=config)))
        wait_for(lambda: watching.values(ours(metrics.ROUTERS)), SEEN_S, "the demo's metrics in Prometheus")
        yield watching


def test_every_panel_has_data_under_load(watched: Watched) -> None:
    asked = [
        (f"{board.name}: {panel.title}", query.expr)
        for board in BOARDS
        for row in board.rows
        for panel in row.panels
        for query in panel.queries
    ]
    assert len(asked) > 50
    with watched.elastic.load.clients("chinese", 8):
        # A decision, and all replicas it is about, are part of what boards show.
        wait_for(lambda: watched.elastic.ready()["experts-2"] == 3, 60, "replicas for the hot group")
        missing: list[tuple[str, str]] = []

        def complete() -> bool:
            missing[:] = [(where, expression) for where, expression in asked if not watched.values(expression)]
            return not missing

        try:
            wait_for(complete, SEEN_S, "data for every panel")
        except AssertionError:
            pytest.fail("\n".join(f"{where}: no data for {filled(expression)}" for where, expression in missing))
        busy = wait_for(lambda: experts_with_rows(watched), SEEN_S, "rows of experts")
        assert watched.values(f"sum(ray_{metrics.DECISIONS.name})")[0] >= 1
        assert watched.values(f"max(ray_{metrics.IMBALANCE.name})")[0] > 1
    assert not watched.elastic.load.failures
    assert len(busy) > 16, "some of four layers of sixteen"
    assert watched.firing() == set()


def experts_with_rows(watched: Watched) -> set[tuple[str, str]]:
    """(layer, expert) of every expert that has a series of its own."""
    found = watched.prometheus.query(f'ray_{metrics.EXPERT_ROWS_PER_S.name}{{expert!="other"}}')
    return {(each["metric"]["layer"], each["metric"]["expert"]) for each in found}


def test_a_policy_that_breaks_is_in_health_in_the_metrics_and_an_alert_until_it_is_mended(watched: Watched) -> None:
    clean = {"status": "ok", "missing": [], "reasons": {}}
    wait_for(lambda: watched.elastic.server.get("/health") == clean, SEEN_S, "a cluster without anything wrong")
    watched.elastic.write_policy("version: 1\nbudget: {gpus: many}\n")
    health = wait_for(lambda: degraded(watched), SEEN_S, "the reason in /health")  # and the status stays 200
    assert (health["status"], health["degraded"]) == ("ok", ["policy_file"])
    assert "budget.gpus: the value 'many' is not allowed" in health["reasons"]["policy_file"]
    wait_for(lambda: watched.values(ours(metrics.POLICY_ERROR)) == [1.0], SEEN_S, "the metric to rise")
    wait_for(lambda: watched.values(f'max(ray_{metrics.DEGRADED.name}{{reason="policy_file"}})') == [1.0], SEEN_S, "it")
    wait_for(lambda: watched.firing() == {"PolicyFileUnusable"}, SEEN_S, "the alert, and no other")

    watched.elastic.write_policy(watched.elastic.policy_text)
    wait_for(lambda: not degraded(watched), SEEN_S, "the end of the reason")
    wait_for(lambda: watched.values(ours(metrics.POLICY_ERROR)) == [0.0], SEEN_S, "the metric to fall")
    wait_for(lambda: watched.firing() == set(), SEEN_S, "the end of the alert")
    assert json.dumps(watched.elastic.server.get("/health")["reasons"]) == "{}"


def test_a_replica_that_hangs_is_in_health_before_it_is_missed(watched: Watched) -> None:
    wait_for(lambda: not degraded(watched), SEEN_S, "a cluster without anything wrong")
    age = f'ray_{metrics.SIGNAL_AGE_S.name}{{part="experts-0"}}'
    with stopped(processes(watched).of("experts-0")):
        found = wait_for(lambda: degraded(watched), HEARTBEAT_TIMEOUT_S, "the reason in /health")
        # Told once a second and exported every other: by then the replica may be missed as well.
        wait_for(lambda: watched.values(f"max({age})")[0] > 5, SEEN_S, "the metric to rise")
    assert found["status"] == "ok"
    assert "signals" in found["degraded"]
    assert "experts-0" in found["reasons"]["signals"]
    wait_for(lambda: watched.values(f"max(ray_{metrics.SIGNAL_AGE_S.name})")[0] < 5, SEEN_S, "the metric to fall")
    wait_for(lambda: not degraded(watched), SEEN_S, "the end of the reason")


def test_series_of_experts_that_get_no_rows_any_more_end(watched: Watched) -> None:
    wait_for(lambda: experts_with_rows(watched) == set(), RATE_WINDOW_S + SEEN_S, "the end of the load's series")


def test_a_controller_that_hangs_is_in_health_and_in_an_alert_while_requests_are_answered(watched: Watched) -> None:
    controller = processes(watched).controllers
    assert len(controller) == 1
    with stopped(controller):
        found = wait_for(lambda: degraded(watched), POLICY_SILENCE_S + SEEN_S, "the reason in /health")
        assert (found["status"], found["degraded"]) == ("ok", ["autoscaler"])
        assert "said nothing for" in found["reasons"]["autoscaler"]
        wait_for(lambda: "AutoscalerSilent" in watched.firing(), SEEN_S, "the alert")
        with watched.elastic.load.clients("chinese", 1):
            answers = watched.elastic.load.answers
            wait_for(lambda: watched.elastic.load.answers > answers, SEEN_S, "an answer without a controller")
    wait_for(lambda: not degraded(watched), SEEN_S, "the end of the reason")
    wait_for(lambda: watched.firing() == set(), SEEN_S, "the end of the alert")
    assert not watched.elastic.load.failures


def processes(watched: Watched) -> Processes:
    return Processes(psutil.Process(watched.elastic.server.process.pid), APPLICATION)


def degraded(watched: Watched) -> dict[str, Any] | None:
    """The body of `/health` where something is wrong."""
    try:
        health: dict[str, Any] = watched.elastic.server.get("/health")
    except HTTPError as error:  # 503: something is missing as well
        health = json.load(error)
    return health if "degraded" in health else None

"""`configs/elastic.yaml` under load: hot groups get replicas, cold ones keep their minimum, nobody's answer suffers.

One server for all tests, in this order: each starts and ends with one replica of every group. Devices are emulated, so
that replicas add speed on a machine where they add no cores; answers are real and compared with the whole model's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from autoscale.spec import ScalingSpec
from infra.bench.added_replica import BARE
from tests.e2e.conftest import WholeModel
from tests.e2e.elastic import Elastic, Watch, elastic_server, first_rows_s
from tests.e2e.load import Load, references
from tests.serving import ROOT, wait_for

PYTHON, CHINESE = "experts-0", "experts-2"
TICK_S = 0.5
"""The control tick: how often replicas report to the controller."""
REPORT_LAG_S = 2.0
"""How much later than the controller `/v1/cluster` may see a load: a heartbeat a second, and the test's own look."""
STEADY_S = float(os.environ.get("EXPERTSCALE_STEADY_S", "60"))
LEVELS = (1, 5, 12)
"""Clients at the three levels of steady load."""


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, whole_model: WholeModel) -> Iterator[Elastic]:
    wanted = references(whole_model.complete)
    with elastic_server(tmp_path_factory.mktemp("elastic"), lambda server: Load(server, wanted)) as running:
        yield running


@pytest.fixture(autouse=True)
def every_answer_is_right(elastic: Elastic) -> Iterator[None]:
    """All the while requests run: none fails, and every answer is the whole model's."""
    elastic.settle(1)
    answers = elastic.load.answers
    yield
    assert not elastic.load.failures
    if elastic.load.answers > answers:
        elastic.settle(1, timeout_s=90)


def test_an_edit_is_in_force_within_two_seconds_and_an_invalid_one_is_shown_and_changes_nothing(
    elastic: Elastic,
) -> None:
    pids = {group: elastic.pids(group) for group in elastic.targets()}
    before = elastic.cluster()["policy"]
    good = yaml.safe_load(elastic.policy_text)
    elastic.write_policy(yaml.safe_dump({**good, "defaults": {**good["defaults"], "target_utilization": 0.6}}))
    started = time.monotonic()
    wait_for(lambda: elastic.cluster()["policy"]["version"] != before["version"], 10, "the new version")
    assert time.monotonic() - started < 2
    in_force = elastic.cluster()["policy"]
    elastic.write_policy(yaml.safe_dump({**good, "defaults": {**good["defaults"], "target_utilization": 1.5}}))
    refused = wait_for(lambda: elastic.cluster()["policy"]["error"], 10, "the reason of the refusal")
    assert "target_utilization" in refused
    assert "1.5" in refused
    assert elastic.cluster()["policy"]["version"] == in_force["version"]
    wait_for(lambda: refused.splitlines()[0] in elastic.server.log.read_text(), 20, "the reason in the log")
    elastic.write_policy(elastic.policy_text)
    wait_for(lambda: elastic.cluster()["policy"]["error"] is None, 10, "the valid file again")
    assert {group: elastic.pids(group) for group in elastic.targets()} == pids


def test_a_hot_group_grows_at_once_and_speed_by_what_the_devices_predict(
    elastic: Elastic, record_property: Any
) -> None:
    defaults = elastic.spec.defaults
    started_at, known = time.time(), elastic.pids(CHINESE)
    with elastic.load.clients("chinese", 8):
        crossed_at = wait_for(lambda: crossing(elastic, CHINESE, defaults), 30, "a signal over its line")
        first = wait_for(lambda: elastic.decisions(started_at), 30, "a decision")[0]
        late_s = first["time"] - crossed_at
        assert -REPORT_LAG_S <= late_s <= defaults.upscale.after_s + 5 * TICK_S
        assert first["time"] - started_at <= elastic.spec.signals.window_s + defaults.upscale.after_s + 5 * TICK_S
        assert (first["group"], first["from"]) == (CHINESE, 1)
        ours = [first_rows_s(elastic, CHINESE, known, first["time"])]
        wait_for(lambda: elastic.ready()[CHINESE] == elastic.targets()[CHINESE], 30, "all new replicas")
        wait_for(lambda: all(each["rows"] for each in elastic.group(CHINESE)["replicas"]), 30, "rows on every replica")
        many = elastic.ready()[CHINESE]
        fast, _ = speed(elastic, 12)

        elastic.edit_policy(lambda p: p["defaults"].update(max_replicas=1))
        elastic.settle(1)
        slow, rows_per_token = speed(elastic, 12)
        known, edited_at = elastic.pids(CHINESE), time.time()
        elastic.edit_policy(lambda p: p["defaults"].update(max_replicas=defaults.max_replicas))
        again = wait_for(lambda: elastic.decisions(edited_at), 30, "growth again")[0]
        ours.append(first_rows_s(elastic, CHINESE, known, again["time"]))
        wait_for(lambda: elastic.ready()[CHINESE] == many, 30, "all new replicas again")
        bare = [bare_replica_s(elastic, count) for count in (2, 3)]
        assert {each["group"] for each in elastic.decisions(started_at)} == {CHINESE}, "the others keep their minimum"
    predicted = 1 / (1 / slow - saved_s(rows_per_token, many))
    for name, value in (("predicted", predicted / slow), ("measured", fast / slow), ("decision_s", late_s)):
        record_property(f"{name} with {many} replicas", round(value, 2))
    record_property(
        "first rows of a new replica / bare replica", round(statistics.median(ours) / statistics.median(bare), 2)
    )
    assert 0.75 <= fast / predicted <= 1.25
    assert statistics.median(ours) <= 1.6 * statistics.median(bare)


def test_replicas_follow_the_domain_within_the_budget_and_leave_when_the_load_ends(elastic: Elastic) -> None:
    elastic.edit_policy(lambda p: p.update(budget={"replicas": 6}))
    with Watch(elastic) as watch:
        with elastic.load.clients("chinese", 8):
            wait_for(lambda: elastic.ready()[CHINESE] == 3, 60, "replicas for Chinese")
            with elastic.load.clients("python", 6):
                wait_for(lambda: denied(elastic, PYTHON), 60, "more wanted for Python than the budget has")
        with elastic.load.clients("python", 8):
            wait_for(lambda: elastic.ready()[PYTHON] >= 2, 60, "replicas for Python")
            wait_for(lambda: elastic.targets()[CHINESE] == 1, 60, "the end of the Chinese group's replicas")
        ended_at = time.time()
        elastic.settle(1, timeout_s=90)
    assert watch.looks > 50
    assert watch.most == 6, "the budget was reached, and never passed"
    downscale = elastic.spec.defaults.downscale
    last = next(each for each in elastic.decisions(ended_at) if (each["group"], each["to"]) == (PYTHON, 1))["time"]
    assert last - ended_at >= downscale.after_s
    steps = 5  # at most 2 replicas more than the minimum in two groups, and one to spare
    assert last - ended_at <= steps * downscale.after_s + elastic.spec.signals.window_s + 5 * TICK_S
    elastic.edit_policy(lambda p: p.update(budget={"replicas": 8}))


@pytest.mark.timeout(60 + 3 * int(STEADY_S) + 240)
def test_steady_load_at_three_levels_changes_at_most_once_a_level(elastic: Elastic, record_property: Any) -> None:
    for clients in LEVELS:
        started_at = time.time()
        with elastic.load.clients("chinese", clients):
            time.sleep(STEADY_S)  # the load itself lasts that long
            made = elastic.decisions(started_at)
        changes = [f"{each['group']} {each['from']} -> {each['to']}" for each in made]
        record_property(f"{clients} clients", ", ".join(changes) or "no change")
        assert len(changes) <= 1, made


def crossing(elastic: Elastic, group: str, defaults: ScalingSpec) -> float:
    """Now (Unix seconds) if `/v1/cluster` shows the group's load over one of its lines, else 0."""
    replicas = elastic.group(group)["replicas"]
    over = any(
        (replica["utilization"] or 0) > defaults.target_utilization
        or (replica["critical_share"] or 0) > defaults.target_critical_share
        for replica in replicas
    )
    return time.time() if over else 0.0


def denied(elastic: Elastic, group: str) -> bool:
    """Whether the policy says that the budget denies the group more replicas."""
    return any(each.startswith(f"{group}:") and "budget" in each for each in elastic.cluster()["policy"]["held_back"])


def speed(elastic: Elastic, seconds: float) -> tuple[float, dict[str, float]]:
    """(tokens per second, group -> rows per token) over some seconds of the load that runs."""
    start, rows = time.monotonic(), elastic.rows()
    time.sleep(seconds)  # what is measured lasts that long
    stop, rows_after = time.monotonic(), elastic.rows()
    tokens = elastic.load.tokens_between(start, stop)
    return tokens / (stop - start), {group: (rows_after[group] - rows[group]) / tokens for group in rows}


def saved_s(rows_per_token: dict[str, float], replicas: int) -> float:
    """Seconds a token saved by `replicas` of the hot group instead of one, until the next group is the slowest."""
    config = yaml.safe_load((ROOT / "deployments" / "configs" / "elastic.yaml").read_text())
    rows_per_s = config["applications"][0]["args"]["experts"]["emulate"]["rows_per_s"]
    hot = max(rows_per_token.values())
    others = sorted(rows_per_token.values())[-2]
    return (hot - max(hot / replicas, others)) / rows_per_s


def bare_replica_s(elastic: Elastic, count: int) -> float:
    """Seconds from asking Serve for one more bare replica, which imports torch, until it runs; the load goes on."""

    def deploy(replicas: int) -> None:
        bare = {**BARE, "deployments": [{"name": "Bare", "num_replicas": replicas}]}
        elastic.rest.deploy([elastic.application, bare])

    def running() -> int:
        return elastic.rest.replica_states(BARE["name"]).get("Bare", []).count("RUNNING")

    if not running():
        deploy(count - 1)
        wait_for(lambda: running() == count - 1, 90, "the first bare replica")
    started = time.monotonic()
    deploy(count)
    wait_for(lambda: running() == count, 60, "one more bare replica")
    return time.monotonic() - started

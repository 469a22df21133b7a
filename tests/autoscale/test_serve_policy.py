"""The policy as Serve calls it, with doubles of Serve's contexts and of the link to its controller. No Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale import cluster_side, serve_policy
from autoscale.cluster_budget import Given
from autoscale.cluster_link import Wanted
from autoscale.controller_link import Details
from autoscale.serve_policy import BUDGET_WAIT_S, ServePolicy
from cluster.decisions import PolicyReport
from cluster.metering import Source
from cluster.metrics import (
    ACTUAL_REPLICAS,
    DECISIONS,
    POLICY_ERROR,
    POLICY_FAILURES,
    POLICY_TICKS,
    SIGNAL_AGE_S,
    STARTING_REPLICAS,
    TARGET_REPLICAS,
)
from cluster.nodes.offers import Offer
from tests.recorder import Recorder

POLICY = """
version: 1
budget: {replicas: 4}
defaults: {max_replicas: 3, upscale: {after_s: 1, max_step: 2}, downscale: {after_s: 3}}
signals: {window_s: 2, max_age_s: 2}
"""
ARGS = {
    "model": {"path": "anywhere"},
    "experts": {"groups": 2, "replicas": "elastic", "emulate": {"rows_per_s": 100}},
}
SERVE_TICK_S = 0.11


class FakeLink:
    """The link to the controller as a list of what it was told."""

    def __init__(self, application: str, directory: str, metrics: Source) -> None:
        self.metrics = metrics
        self.latest: Details | None = None
        self.reports: list[PolicyReport] = []
        self.names = (application, directory)

    def watch_closely(self, busy: bool) -> None:
        self.busy = busy

    def report(self, report: PolicyReport) -> None:
        self.reports.append(report)


@dataclass(frozen=True)
class Id:
    """A deployment id or a replica id of Serve: hashable, with the attributes that are read."""

    name: str
    app_name: str = "app"

    @property
    def unique_id(self) -> str:
        return self.name


@dataclass
class Serve:
    """Enough of the Serve controller: replicas that report, and targets that the policy sets."""

    policy: ServePolicy
    now: list[float]
    running: dict[str, int]
    targets: dict[str, int]
    loads: dict[str, dict[str, float]] = field(default_factory=dict)
    seq: float = 0.0

    def contexts(self) -> dict[Id, Any]:
        found = {}
        for name, count in self.running.items():
            ids = [Id(f"{name}#{number}") for number in range(count)]
            load = {"seq": self.seq, "uptime_s": self.seq * SERVE_TICK_S, **self.loads.get(name, {})}
            raw = {
                metric: {each: [SimpleNamespace(timestamp=0.0, value=value)] for each in ids}
                for metric, value in load.items()
            }
            found[Id(name)] = SimpleNamespace(
                running_replicas=ids,
                raw_metrics=raw,
                current_num_replicas=count,
                target_num_replicas=self.targets[name],
            )
        return found

    def tick(self) -> dict[str, int]:
        self.now[0] += SERVE_TICK_S
        self.seq += 1
        answer, states = self.policy(self.contexts())
        assert states == {}
        asked = {key.name: count for key, count in answer.items()}
        self.targets |= asked
        return asked

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / SERVE_TICK_S)):
            self.tick()

    def busy(self, group: str, rows_per_s: float, share: float) -> None:
        """From now on routers wait for `group` that share of their step time, and offer it that many rows."""
        t = self.seq * SERVE_TICK_S
        self.loads = {
            "Router": {
                "steps": 10 * t,
                "step_s": 0.9 * t,
                **{f"rows:experts-{i}": t for i in range(2)},
                **{f"wait_s:experts-{i}": 0.01 * t for i in range(2)},
                **{f"critical_s:experts-{i}": 0.0 for i in range(2)},
                f"rows:{group}": rows_per_s * t,
                f"wait_s:{group}": share * 0.9 * t,
                f"critical_s:{group}": share * 0.9 * t,
            }
        }
        for i in range(2):
            name = f"experts-{i}"
            rows = self.loads["Router"][f"rows:{name}"] / max(1, self.running[name])
            self.loads[name] = {"rows": rows, "busy_s": rows / 100, "queue_rows": 0.0, "speed_rows_per_s": 100.0}


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def serve(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    return serve_with(policy_file, monkeypatch)


def serve_with(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    now = [1000.0]
    monkeypatch.setattr(serve_policy, "ControllerLink", FakeLink)
    monkeypatch.setattr(serve_policy.time, "monotonic", lambda: now[0])
    policy = ServePolicy(str(policy_file))
    units = dict.fromkeys(("Router", "experts-0", "experts-1"), 1)
    made = Serve(policy, now, dict(units), dict(units))
    made.tick()
    link_of(made).latest = Details(ARGS, {}, asked_at=now[0])
    return made


def link_of(serve: Serve) -> FakeLink:
    link = serve.policy._link
    assert isinstance(link, FakeLink)
    return link


def load_for(serve: Serve, seconds: float, group: str, rows_per_s: float = 60, share: float = 0.6) -> None:
    for _ in range(round(seconds / SERVE_TICK_S)):
        serve.busy(group, rows_per_s, share)
        serve.tick()


def test_nothing_is_decided_before_the_controller_has_said_what_it_runs(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = serve_with(policy_file, monkeypatch)
    link_of(serve).latest = None
    load_for(serve, 8, "experts-0")
    assert serve.targets == {"Router": 1, "experts-0": 1, "experts-1": 1}
    assert link_of(serve).names == ("app", "Directory")


def test_a_hot_group_gets_replicas_and_each_change_is_reported_with_its_reason(serve: Serve) -> None:
    load_for(serve, 8, "experts-0")
    assert serve.targets["experts-0"] == 3
    assert serve.targets["experts-1"] == 1
    assert serve.targets["Router"] == 1, "a fixed number is nobody's to change"
    decision = link_of(serve).reports[-1].decisions[-1]
    assert (decision.group, decision.pool, decision.after) == ("experts-0", "default", 3)
    assert "experts-0" in decision.reason
    assert link_of(serve).busy, "details are read closely while replicas come"


def test_what_is_leaving_counts_against_the_budget_until_the_controller_shows_it_gone(serve: Serve) -> None:
    load_for(serve, 8, "experts-0")
    serve.running["experts-0"] = 3
    load_for(serve, 12, "experts-1")
    assert serve.targets["experts-0"] == 1
    taken_back_at = serve.now[0]
    assert serve.targets["experts-1"] == 1, "four are held as long as the two may still be there"
    link_of(serve).latest = Details(ARGS, {"experts-0": 1}, asked_at=taken_back_at + 5)
    serve.running["experts-0"] = 1
    load_for(serve, 4, "experts-1")
    assert serve.targets["experts-1"] == 2
    link_of(serve).latest = Details(ARGS, {"experts-0": 0}, asked_at=taken_back_at + 9)
    load_for(serve, 4, "experts-1")
    assert serve.targets["experts-1"] == 3


def test_replicas_beyond_their_target_hold_their_devices_whoever_lowered_it(serve: Serve) -> None:
    serve.running["experts-0"] = 3  # a controller that restarted finds them so, and has taken back nothing itself
    load_for(serve, 8, "experts-1")
    assert serve.targets["experts-1"] == 1
    serve.running["experts-0"] = 1
    load_for(serve, 8, "experts-1")
    assert serve.targets["experts-1"] == 3


def test_a_group_whose_signals_are_missing_is_told(serve: Serve) -> None:
    serve.run(4)
    assert any("experts-0: no decision" in each for each in link_of(serve).reports[-1].held_back)
    load_for(serve, 4, "experts-1", rows_per_s=1, share=0.01)
    assert link_of(serve).reports[-1].held_back == ()


def test_silent_routers_leave_every_target_as_it_is(serve: Serve) -> None:
    load_for(serve, 8, "experts-0")
    serve.running["experts-0"] = 3
    load_for(serve, 2, "experts-0")
    frozen = serve.contexts()
    for _ in range(100):
        serve.now[0] += SERVE_TICK_S
        answer, _ = serve.policy(frozen)
        assert all(serve.targets[key.name] == count for key, count in answer.items())


def test_an_invalid_edit_is_reported_and_the_old_policy_stays(serve: Serve, policy_file: Path) -> None:
    serve.run(2)
    before = link_of(serve).reports[-1]
    assert before.error is None
    policy_file.write_text(POLICY.replace("max_replicas: 3", "max_replicas: 0"))
    serve.run(2)
    after = link_of(serve).reports[-1]
    assert after.version == before.version
    assert after.error is not None
    assert "max_replicas" in after.error
    assert told(serve).of(POLICY_ERROR) == 1
    load_for(serve, 8, "experts-0")
    assert serve.targets["experts-0"] == 3


def test_a_policy_that_fails_is_reported_and_counted_until_it_decides_again(serve: Serve) -> None:
    serve.run(2)
    serve.now[0] += 1
    serve.policy({key: SimpleNamespace() for key in serve.contexts()})
    assert "AttributeError" in (link_of(serve).reports[-1].failure or "")
    assert told(serve).of(POLICY_FAILURES) == 1
    serve.run(2)
    assert link_of(serve).reports[-1].failure is None


def test_signals_that_stall_are_named_with_their_age_until_they_come_again(serve: Serve) -> None:
    load_for(serve, 4, "experts-0")
    assert link_of(serve).reports[-1].stalled == ()
    frozen = serve.contexts()
    for _ in range(30):
        serve.now[0] += SERVE_TICK_S
        serve.policy(frozen)
    assert set(link_of(serve).reports[-1].stalled) == {"Router", "experts-0", "experts-1"}
    assert told(serve).of(SIGNAL_AGE_S, part="experts-0") > 2
    load_for(serve, 2, "experts-0")
    assert link_of(serve).reports[-1].stalled == ()


def test_a_step_that_lasts_is_a_stall_although_every_report_is_new(serve: Serve) -> None:
    load_for(serve, 4, "experts-0")
    serve.loads["Router"]["running"] = 1.0  # and its steps do not rise
    serve.run(2)
    assert link_of(serve).reports[-1].stalled == ()
    serve.run(4)
    assert set(link_of(serve).reports[-1].stalled) == {"experts-0", "experts-1"}
    assert told(serve).of(SIGNAL_AGE_S, part="experts-0") < 1


def test_an_idle_cluster_and_replicas_that_come_are_no_stall(serve: Serve) -> None:
    load_for(serve, 4, "experts-0")
    reported = len(link_of(serve).reports)
    for count in (2, 3):
        serve.running["experts-0"] = serve.targets["experts-0"] = count
        load_for(serve, 5, "experts-0", rows_per_s=0.0, share=0.0)
    serve.run(10)
    assert not any(report.stalled for report in link_of(serve).reports[reported:])


def test_what_is_decided_is_counted_and_levels_follow_the_replicas(serve: Serve) -> None:
    load_for(serve, 8, "experts-0")
    now = told(serve)
    assert now.of(DECISIONS, group="experts-0", direction="up", reason="critical_path") == 1
    levels = [now.of(each, group="experts-0", pool="default") for each in (TARGET_REPLICAS, ACTUAL_REPLICAS)]
    assert levels == [3, 1]
    assert now.of(STARTING_REPLICAS, group="experts-0", pool="default") == 2
    assert now.of(POLICY_ERROR) == 0
    assert now.of(POLICY_TICKS) > 70


def told(serve: Serve) -> Recorder:
    """What the link would publish now."""
    recorder = Recorder()
    link_of(serve).metrics(recorder.meter)
    return recorder


def test_an_edit_that_does_not_fit_the_groups_is_refused_too(serve: Serve, policy_file: Path) -> None:
    serve.run(2)
    policy_file.write_text(POLICY + "groups: [{match: nobody}]\n")
    serve.run(2)
    error = link_of(serve).reports[-1].error
    assert error is not None
    assert "nobody" in error


@pytest.mark.parametrize(
    "broken",
    [
        lambda contexts: {key: SimpleNamespace() for key in contexts},
        lambda contexts: dict.fromkeys(contexts),
        lambda contexts: dict.fromkeys(contexts, SimpleNamespace(running_replicas=1, raw_metrics=2)),
    ],
)
def test_contexts_that_make_no_sense_are_logged_once_and_change_nothing(
    serve: Serve, broken: Callable[[Mapping[Id, Any]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    serve.run(1)
    logging.getLogger("autoscale").parent = logging.getLogger()
    with caplog.at_level(logging.ERROR):
        for _ in range(20):
            serve.now[0] += SERVE_TICK_S  # every second call is between two decisions
            assert serve.policy(broken(serve.contexts())) == ({}, {})
    assert sum("the policy failed" in record.message for record in caplog.records) == 1
    load_for(serve, 8, "experts-0")
    assert serve.targets["experts-0"] == 3


class FakeCluster:
    """The link to the cluster under the policy, and what was wanted of it."""

    def __init__(self) -> None:
        self.latest: Given | None = None
        self.wanted: list[Wanted] = []

    def want(self, wanted: Wanted) -> None:
        self.wanted.append(wanted)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster()
    monkeypatch.setattr(cluster_side, "ClusterLink", lambda _spec: made)
    return made


def test_a_budget_left_to_the_cluster_decides_nothing_before_it_is_known_and_binds_then(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster
) -> None:
    policy_file.write_text(POLICY.replace("{replicas: 4}", "{cpus: cluster}"))
    serve = serve_with(policy_file, monkeypatch)
    load_for(serve, 8, "experts-0")
    assert serve.targets == {"Router": 1, "experts-0": 1, "experts-1": 1}
    report = link_of(serve).reports[-1]
    assert report.held_back == ("budget.cpus: no decision, what the cluster can give is not known yet",)
    assert report.cluster == {"source": "not known yet", "read_at": None, "troubles": []}
    # A router and two replicas take 0.3 of a CPU: there is room for one more.
    cluster.latest = Given("ray", (Offer("a", 1, 0, 0.4),), serve.now[0], 12.3, {"nodes": []}, troubles=("away",))
    load_for(serve, 8, "experts-0")
    assert serve.targets["experts-0"] == 2
    report = link_of(serve).reports[-1]
    assert "budget: 0.4 cpus" in report.held_back[-1]
    assert report.cluster == {"source": "ray", "read_at": 12, "nodes": [], "troubles": ["away"]}
    serve.running["experts-0"] = 2
    load_for(serve, 120, "experts-0")
    assert serve.targets["experts-0"] == 2, "what is old still counts"
    assert "as the cluster was 2 min ago" in link_of(serve).reports[-1].held_back[0]


def test_a_budget_that_stays_unknown_is_told_and_signals_are_watched_all_the_same(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster
) -> None:
    policy_file.write_text(POLICY.replace("{replicas: 4}", "{cpus: cluster}"))
    serve = serve_with(policy_file, monkeypatch)
    load_for(serve, BUDGET_WAIT_S / 2, "experts-0")
    assert link_of(serve).reports[-1].no_budget == (), "it may still come"
    levels = [told(serve).of(each, group="experts-0", pool="default") for each in (TARGET_REPLICAS, ACTUAL_REPLICAS)]
    assert levels == [1, 1], "the autoscaler is seen"
    load_for(serve, BUDGET_WAIT_S, "experts-0")
    unknown = "budget.cpus: no decision, what the cluster can give is not known yet"
    assert link_of(serve).reports[-1].no_budget == (unknown,)
    frozen = serve.contexts()
    for _ in range(30):
        serve.now[0] += SERVE_TICK_S
        serve.policy(frozen)
    assert told(serve).of(SIGNAL_AGE_S, part="experts-0") > 2
    assert "experts-0" in link_of(serve).reports[-1].stalled
    cluster.latest = Given("ray", (Offer("a", 1, 0, 0.4),), serve.now[0], 12.3)
    load_for(serve, 1, "experts-0")
    assert link_of(serve).reports[-1].no_budget == ()


def test_machines_are_asked_for_before_a_scheduled_peak(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, cluster: FakeCluster
) -> None:
    entry = "[{cron: '* * * * *', duration_s: 60, groups: {experts-1: {min_replicas: 3}}}]"
    policy_file.write_text(f"{POLICY}schedule: {entry}\nprewarm: {{lead_s: 60, worker_groups: [l4]}}\n")
    serve = serve_with(policy_file, monkeypatch)
    serve.run(1)
    prewarm = cluster.wanted[-1].prewarm
    assert prewarm is not None
    assert prewarm.patterns == ("l4",)
    assert {seat.name: (seat.replicas, seat.peak) for seat in prewarm.seats}["experts-1"] == (3, True)
    assert not cluster.wanted[-1].budget
    assert link_of(serve).reports[-1].held_back[0].startswith("experts-0: no decision by load")


absurd = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 1e308, float("nan"), float("inf")]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-100, 100),
            st.dictionaries(
                st.sampled_from(
                    ["seq", "uptime_s", "steps", "step_s", "running", "waiting", "rows", "busy_s", "speed_rows_per_s"]
                    + [f"{key}:experts-{i}" for key in ("rows", "wait_s", "critical_s", "coming") for i in range(2)]
                ),
                absurd,
            ),
            st.integers(0, 5),
        ),
        max_size=12,
    )
)
def test_no_numbers_and_no_clock_make_it_raise_or_ask_for_what_cannot_be(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, dict[str, float], int]]
) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(POLICY)
    with pytest.MonkeyPatch.context() as patch:
        serve = serve_with(path, patch)
        for jump, load, running in steps:
            serve.loads = dict.fromkeys(serve.running, load)
            serve.running["experts-1"] = running
            serve.now[0] += jump
            asked = serve.tick()
            assert serve.policy._complaint == ""
            assert all(1 <= count <= 8 for count in asked.values())

"""The thread that asks the controller and tells the Directory, turn by turn, with doubles of both. No Ray cluster."""

from __future__ import annotations

import asyncio
import enum
import gc
import threading
import time
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from autoscale import controller_link
from autoscale.controller_link import NEWS_PERIOD_S, REPORT_PERIOD_S, ControllerLink, _Due
from cluster.decisions import PolicyReport
from cluster.metering import Meter
from cluster.metrics import HELD_BACK, Metric
from tests.recorder import Recorder


class State(enum.Enum):
    """As Serve's own."""

    RUNNING = "RUNNING"
    STOPPING = "STOPPING"


class Outside:
    """The controller and the Directory. failing: whether their answers are errors."""

    def __init__(self) -> None:
        self.failing = False
        self.asked = 0
        self.told: list[PolicyReport] = []
        states = {"experts-0": [State.RUNNING, State.STOPPING], "Router": [State.RUNNING]}
        self.applications: dict[str, Any] = {
            "app": {
                "deployed_app_config": {"args": {"model": {}}},
                "deployments": {name: {"replicas": [{"state": each} for each in s]} for name, s in states.items()},
            }
        }

    async def details(self) -> Any:
        self.asked += 1
        self.fail_if_asked_to()
        return {"applications": self.applications}

    async def report(self, report: PolicyReport) -> None:
        self.fail_if_asked_to()
        self.told.append(report)

    def fail_if_asked_to(self) -> None:
        if self.failing:
            raise ConnectionError("nobody there")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Outside:
    made = Outside()
    controller = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=made.details))
    handle = SimpleNamespace(report_policy=SimpleNamespace(remote=made.report))
    monkeypatch.setattr(controller_link, "ray", SimpleNamespace(get_actor=lambda *_a, **_k: controller))
    monkeypatch.setattr(controller_link, "serve", SimpleNamespace(get_deployment_handle=lambda *_a: handle))
    return made


@pytest.fixture
def link(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> ControllerLink:  # noqa: ARG001
    """A link whose thread does nothing: the tests take its turns."""

    async def nothing(_link: object) -> None:
        return

    monkeypatch.setattr(controller_link, "_run", nothing)
    return ControllerLink("app", "Directory")


def test_details_are_the_arguments_and_what_is_stopping(link: ControllerLink, outside: Outside) -> None:
    assert link.latest is None
    asyncio.run(link.turn(_Due()))
    assert link.latest is not None
    assert link.latest.args == {"model": {}}
    assert link.latest.stopping == {"experts-0": 1, "Router": 0}
    outside.applications = {}
    asyncio.run(link.turn(_Due()))
    assert link.latest.stopping["experts-0"] == 1, "an application that is not there says nothing new"


def test_details_are_read_often_only_while_replicas_come_or_go(link: ControllerLink, outside: Outside) -> None:
    due = _Due()
    link.watch_closely(False)
    asyncio.run(link.turn(due))
    due.details_asked_at -= 1.0
    asyncio.run(link.turn(due))
    assert outside.asked == 1
    link.watch_closely(True)
    asyncio.run(link.turn(due))
    assert outside.asked == 2


def test_a_report_is_told_once_and_again_now_and_then(link: ControllerLink, outside: Outside) -> None:
    due, first = _Due(), PolicyReport("p.yaml", version="1")
    link.report(first)
    for _ in range(3):
        asyncio.run(link.turn(due))
        link.report(PolicyReport("p.yaml", version="1"))
    assert outside.told == [first]
    due.report_at -= REPORT_PERIOD_S
    asyncio.run(link.turn(due))
    assert outside.told == [first, first]
    link.report(PolicyReport("p.yaml", version="2"))
    asyncio.run(link.turn(due))
    assert outside.told[-1].version == "1", "news have a shortest period, too"
    due.news_at -= NEWS_PERIOD_S
    asyncio.run(link.turn(due))
    assert outside.told[-1].version == "2"


def test_a_policy_that_is_asked_no_more_falls_silent(
    link: ControllerLink, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(controller_link.time, "monotonic", lambda: now[0])
    link.report(PolicyReport("p.yaml"))
    due = _Due()
    for _ in range(10):
        asyncio.run(link.turn(due))
        now[0] += REPORT_PERIOD_S
    assert len(outside.told) == 3, "now, and twice more in ten seconds"
    link.report(PolicyReport("p.yaml"))
    asyncio.run(link.turn(due))
    assert len(outside.told) == 4


def test_failures_are_logged_once_and_tried_again(
    link: ControllerLink, outside: Outside, caplog: pytest.LogCaptureFixture
) -> None:
    outside.failing = True
    link.report(PolicyReport("p.yaml"))
    for _ in range(3):
        asyncio.run(link.turn(_Due()))
    assert sum("trying on" in record.message for record in caplog.records) == 2, "one for each of the two"
    outside.failing = False
    asyncio.run(link.turn(_Due()))
    assert link.latest is not None
    assert outside.told


def test_the_thread_publishes_although_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, dict[str, str]]] = []
    again, over = threading.Event(), threading.Event()

    class Instruments(Recorder):
        def __init__(self, own: dict[str, str]) -> None:
            super().__init__()
            self.own = own

        def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
            super().set(metric, value, labels)
            told.append((metric.name, self.own))
            if len(told) > 1:
                again.set()

    def failing_at_first(meter: Meter) -> None:
        if not told:
            told.append(("failed", {}))
            raise ValueError("no numbers yet")
        meter.level(HELD_BACK, 1)

    async def never(*_: object) -> None:
        while not over.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(controller_link, "RayInstruments", Instruments)
    monkeypatch.setattr(controller_link, "PERIOD_S", 0.01)
    monkeypatch.setattr(ControllerLink, "turn", never)
    link = ControllerLink("app", "Directory", failing_at_first)
    assert again.wait(10)
    assert told[1] == (HELD_BACK.name, {"application": "app"})
    del link
    over.set()


def test_the_thread_ends_with_the_link(outside: Outside) -> None:
    link = ControllerLink("app", "Directory")
    deadline = time.monotonic() + 10
    while link.latest is None and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert outside.asked >= 1
    gone = weakref.ref(link)
    del link
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        threading.Event().wait(0.01)
    assert gone() is None
    while any(t.name == "autoscale-link" for t in threading.enumerate()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert not any(t.name == "autoscale-link" for t in threading.enumerate())

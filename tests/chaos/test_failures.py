"""Processes are killed and stopped while 16 streams run: no client sees an error, and every text stays the same.

One cluster for all of it, at the end the soak's short form. "stall": the longest wait of any stream between two pieces
of text, "undisturbed" the same without a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.chaos.processes import kill, stopped
from tests.chaos.running import SILENCE_S, Cluster, cluster, undisturbed
from tests.chaos.soak import soak
from tests.chaos.streams import Asked, Streams, Told, ask, requests
from tests.e2e.conftest import WholeModel

ADDED_STALL_S = 0.5
NOISE_S = 0.25
"""Of two shared cores on which, at the same time, the successor of what was killed starts."""
SOAK_S = 60.0
WAIT_S = 30.0
"""experts.wait_s, within which Serve must have restarted the last replica of a group."""


@dataclass(frozen=True)
class Case:
    """The cluster and what its streams must be. undisturbed_s: their longest stall when nothing fails."""

    cluster: Cluster
    wanted: dict[Asked, str]
    undisturbed_s: float
    record: Callable[[str, object], None]

    @contextmanager
    def streaming(self) -> Iterator[Streams]:
        """16 streams in full flow; at the end of the block they have ended as they must."""
        streams = Streams(self.cluster.port, list(self.wanted))
        with streams.running():
            yield streams
        assert not streams.differences(self.wanted)

    def failing(self, fail: Callable[[], None], what: str) -> float:
        """Streams, in the middle of which `fail` happens: their stall in seconds, recorded."""
        with self.streaming() as streams:
            since = time.monotonic()
            fail()
            assert streams.alive == len(self.wanted), "the streams ended before the failure"
        stall_s = streams.stall_s(since)
        self.record(f"stall {what} s", round(stall_s, 2))
        self.record("undisturbed s", round(self.undisturbed_s, 2))
        return stall_s


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("chaos")) as started:
        yield started


@pytest.fixture(scope="module")
def wanted(running: Cluster) -> tuple[dict[Asked, str], float]:
    undisturbed(running.port, requests())  # the first time everything is cold
    return undisturbed(running.port, requests())


@pytest.fixture
def case(running: Cluster, wanted: tuple[dict[Asked, str], float], record_property: Any) -> Case:
    running.restored()
    return Case(running, *wanted, record_property)


def test_the_streams_are_the_whole_models(case: Case, whole_model: WholeModel) -> None:
    greedy = [asked for asked in case.wanted if asked.seed is None]
    for asked in greedy:
        assert case.wanted[asked] == whole_model.continued(asked.prompt, asked.max_tokens)


def test_an_expert_replica_is_killed_and_another_one_lives(case: Case) -> None:
    stall_s = case.failing(lambda: kill(_at_work(case, "experts-0")), "expert killed")
    assert stall_s <= case.undisturbed_s + ADDED_STALL_S + NOISE_S


def test_an_expert_replica_hangs_and_another_one_lives(case: Case) -> None:
    with case.streaming() as streams:
        victim = _at_work(case, "experts-1")
        since = time.monotonic()
        with stopped(victim):
            _until_over(streams)
    stall_s = streams.stall_s(since)
    case.record("stall expert stopped s", round(stall_s, 2))
    assert stall_s <= case.undisturbed_s + ADDED_STALL_S + NOISE_S


def test_every_replica_of_a_group_is_killed(case: Case) -> None:
    experts = case.cluster.processes.of("experts-0")
    stall_s = case.failing(lambda: kill(experts), "whole group killed")
    assert stall_s <= WAIT_S


@pytest.mark.parametrize("count", [1, 2], ids=["another-lives", "all"])
def test_routers_are_killed(case: Case, count: int) -> None:
    routers = case.cluster.processes.of("Router")
    case.failing(lambda: kill(routers[:count]), f"{count} of 2 routers killed")


def test_a_router_hangs_and_another_one_lives(case: Case) -> None:
    routers = case.cluster.processes.of("Router")
    with case.streaming() as streams:
        since = time.monotonic()
        with stopped(routers[:1]):
            _until_over(streams)
            kill(routers[:1])
    stall_s = streams.stall_s(since)
    case.record("stall router stopped s", round(stall_s, 2))
    assert SILENCE_S / 2 < stall_s <= 2 * SILENCE_S + 2


def test_the_directory_is_killed(case: Case) -> None:
    directory = case.cluster.processes.of("Directory")
    stall_s = case.failing(lambda: kill(directory), "directory killed")
    assert stall_s <= case.undisturbed_s + ADDED_STALL_S + NOISE_S
    _is_answered_at_once(case)


def test_the_controller_is_killed(case: Case) -> None:
    controllers = case.cluster.processes.controllers
    assert controllers
    stall_s = case.failing(lambda: kill(controllers), "controller killed")
    assert stall_s <= case.undisturbed_s + ADDED_STALL_S + NOISE_S
    _is_answered_at_once(case)


@pytest.mark.parametrize("what", ["Ingress", "proxy"])
def test_what_clients_see_when_the_front_is_killed(case: Case, what: str) -> None:
    """Their connections end there, so their streams break, with an error; a new request is answered once it is back."""
    processes = case.cluster.processes
    front = processes.proxies if what == "proxy" else processes.of("Ingress")
    assert front
    streams = Streams(case.cluster.port, list(case.wanted))
    with streams.running():
        killed_at = time.monotonic()
        kill(front)
    broken = [told for told in streams.told if not told.whole]
    assert broken
    assert not any(told.done for told in broken)
    assert all(
        case.wanted[asked].startswith(told.text) for asked, told in zip(streams.asked, streams.told, strict=True)
    )
    asked = streams.asked[0]
    told = _retried(case.cluster.port, asked)
    assert told.text == case.wanted[asked]
    case.record(f"{what} killed: streams broken", f"{len(broken)} of {len(streams.told)}")
    case.record("answered again after s", round(told.times[0] - killed_at, 1))


def test_a_minute_of_soak_loses_nothing(running: Cluster, record_property: Any) -> None:
    running.restored()
    report = soak(running, SOAK_S)
    for name, value in report.as_json().items():
        record_property(name, value)
    assert not report.faults, report.table()


def _at_work(case: Case, group: str) -> list[int]:
    """One replica of the group that computes rows for the streams: another one's death would prove nothing."""
    working = case.cluster.working(group)
    assert working, f"no replica of {group} computes anything"
    return working[:1]


def _until_over(streams: Streams) -> None:
    while streams.alive:
        time.sleep(0.1)


def _is_answered_at_once(case: Case) -> None:
    asked = next(iter(case.wanted))
    told = ask(case.cluster.port, asked, Told())
    assert told.whole, told.error
    assert told.text == case.wanted[asked]


def _retried(port: int, asked: Asked, tries: Sequence[float] = (0.5,) * 120) -> Told:
    for pause_s in tries:
        told = ask(port, asked, Told())
        if told.whole:
            return told
        time.sleep(pause_s)
    raise AssertionError(f"no answer: {told.error}")

"""The cluster under failures: two routers, two expert groups of two replicas, sizes steered by a policy file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.processes import Processes
from tests.chaos.streams import Asked, Streams
from tests.e2e.elastic import Elastic, elastic_server
from tests.e2e.load import Load
from tests.serving import wait_for

GROUPS = ("experts-0", "experts-1")
REPLICAS = 2
SILENCE_S = 2.0
HEARTBEATS_S = 3.0
"""Replicas report once a second."""
BACK_S = 90.0
"""Until a killed process has a successor that serves, on a busy machine."""


class Cluster:
    """`elastic`: the server and its policy. application: its Serve name."""

    def __init__(self, elastic: Elastic) -> None:
        self.elastic = elastic
        self.port = elastic.server.port
        self.application: str = elastic.application["name"]

    @cached_property
    def processes(self) -> Processes:
        """Who runs what."""
        return Processes(psutil.Process(self.elastic.server.process.pid), self.application)

    def states(self) -> dict[str, list[str]]:
        """Deployment -> Serve's states of its replicas."""
        return self.elastic.rest.replica_states(self.application)

    def is_whole(self) -> bool:
        """Whether everything that should run serves, and nothing else does."""
        try:
            shown = self.elastic.cluster()
            states = self.states()
        except OSError:
            return False
        groups = {each["name"]: [replica["state"] for replica in each["replicas"]] for each in shown["groups"]}
        targets = {each["name"]: each["target_replicas"] for each in shown["groups"]}
        return (
            all(state == "RUNNING" for each in states.values() for state in each)
            and all(found == ["ready"] * targets[name] for name, found in groups.items())
            and all(len(states[name]) == count for name, count in targets.items())
            and len(shown["routers"]) == len(states["Router"]) == self.routers_wanted
            and all(self.processes.of(name) for name in states)
        )

    @property
    def routers_wanted(self) -> int:
        """What the policy asks for."""
        return int(self.elastic.policy["router"]["min_replicas"])

    def restored(self, timeout_s: float = BACK_S) -> float:
        """Wait until `is_whole`; the seconds that took."""
        started = time.monotonic()
        wait_for(self.is_whole, timeout_s, "everything back")
        return time.monotonic() - started

    def working(self, group: str, timeout_s: float = HEARTBEATS_S) -> list[int]:
        """The processes of those replicas of a group that compute rows just now, oldest first; none if nobody does."""
        with suppress(OSError):
            before = self._rows(group)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                rising = {id for id, rows in self._rows(group).items() if rows > before.get(id, rows)}
                if rising:
                    pids = self.elastic.rest.replica_processes(self.application)
                    chosen = {pids[id] for id in rising if id in pids}
                    return [pid for pid in self.processes.of(group) if pid in chosen]
                time.sleep(0.1)
        return []

    def _rows(self, group: str) -> dict[str, int]:
        """Serve's id of a replica -> rows since its start, as it said last."""
        return {each["id"].rpartition("#")[2]: each["rows"] or 0 for each in self.elastic.group(group)["replicas"]}

    def busy_routers(self) -> list[int]:
        """The processes of routers that run requests, as they said last; none if nobody does."""
        with suppress(OSError):
            busy = {each["id"] for each in self.elastic.cluster()["routers"] if each["running"]}
            pids = self.elastic.rest.replica_processes(self.application)
            chosen = {pids[id] for id in busy if id in pids}
            return [pid for pid in self.processes.of("Router") if pid in chosen]
        return []

    def idle_routers(self) -> list[dict[str, Any]]:
        """Routers of `/v1/cluster` that hold nothing."""
        shown = self.elastic.cluster()["routers"]
        return [each for each in shown if not (each["running"] or each["waiting"] or each["kv_used_tokens"])]

    def sizes(self, *, experts: Mapping[str, int] | None = None, routers: int = REPLICAS) -> None:
        """Ask for so many replicas from now on, by an edit of the policy file; every group has two by default."""

        def change(policy: dict[str, Any]) -> None:
            resize(policy, experts or {}, routers)

        self.elastic.edit_policy(change)


def resize(policy: dict[str, Any], experts: Mapping[str, int], routers: int) -> None:
    """Fixed numbers of replicas: nothing but the file decides."""
    policy["defaults"] |= {"min_replicas": REPLICAS, "max_replicas": REPLICAS}
    policy["groups"] = [
        {"match": name, "min_replicas": count, "max_replicas": count} for name, count in experts.items()
    ]
    policy["router"] |= {"min_replicas": routers, "max_replicas": routers}


def small(config: dict[str, Any], policy: dict[str, Any]) -> None:
    """Two groups instead of four, so that two replicas of each still fit the machine; devices as fast as they are."""
    args = config["applications"][0]["args"]
    experts = args["experts"]
    experts |= {"groups": len(GROUPS), "placement": "contiguous"}
    del experts["emulate"]
    args["ingress"] = {"silence_s": SILENCE_S}
    resize(policy, {}, REPLICAS)


@contextmanager
def cluster(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None] = small) -> Iterator[Cluster]:
    """Running, and whole when the block begins."""
    with elastic_server(folder, lambda server: Load(server, {}), change=change) as elastic:
        running = Cluster(elastic)
        running.restored()
        yield running


def undisturbed(port: int, asked: list[Asked]) -> tuple[dict[Asked, str], float]:
    """What the requests are answered with when nothing fails, and the longest stall of a stream then."""
    streams = Streams(port, asked)
    with streams.running():
        since = time.monotonic()
    broken = [each.error for each in streams.told if not each.whole]
    assert not broken, broken
    return {each: told.text for each, told in zip(asked, streams.told, strict=True)}, streams.stall_s(since)

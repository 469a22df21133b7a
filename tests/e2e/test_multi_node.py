"""A day on three machines without Kubernetes: every command of infra/MULTI_NODE.md, in its order. About 100 s.

A head and two workers of different labels, in namespaces of their own. Where those are not allowed the test is skipped:
tests/chaos/test_node_loss.py and tests/e2e/test_pools.py still hold what Ray nodes on one machine can show.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.sizing.shape import read_shape
from cluster.sizing.step import traffic
from tests.chaos.streams import Asked, Streams
from tests.e2e.conftest import CHECKPOINT, WholeModel
from tests.e2e.load import PROMPTS
from tests.e2e.machines import Machine, NotAllowedError, ScriptError, carried_bytes, inside, machines
from tests.serving import ROOT, wait_for

DOCUMENT = ROOT / "infra" / "MULTI_NODE.md"
PORT = 8000
NODES = ("head", "large", "small")
SMALL = 1
"""The number of its wire: the second behind the head."""
NODES_S, READY_S, BACK_S = 60.0, 90.0, 60.0
STALL_S = 5.0
LEAVING_S = 30.0
SCRAPED_S = 40.0
"""Prometheus reads the list of nodes every 10 s and scrapes every 15 s."""
MOST_BESIDE = 1.5
"""Rows, those of the prompts too, and headers over the rows of the tokens generated."""
TOKENS = 400


def blocks() -> dict[str, str]:
    """Name -> script of every block of commands in the document."""
    found = re.findall(r"<!-- ([a-z ]+) -->\n```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return dict(found)


@dataclass(frozen=True)
class Day:
    """The machines, and what is documented to run on them."""

    machines: dict[str, Machine]
    logs: Path

    def run(self, name: str, block: str) -> str:
        return self.machines[name].run(_script(block))

    def start(self, name: str) -> None:
        """Start Ray on a machine."""
        block = "head" if name == "head" else "worker"
        self.machines[name].start(_script(block), self.logs / f"{name}.log")

    def is_complete(self) -> bool:
        """Whether Ray counts all nodes."""
        try:
            return len(re.findall(r"^ 1 node_", self.run("head", "nodes"), re.MULTILINE)) == len(NODES)
        except ScriptError:
            return False

    def cluster(self) -> dict[str, Any] | None:
        """`/v1/cluster`, once everything answers; None before."""
        try:
            health, cluster = (json.loads(line) for line in self.run("head", "look").splitlines())
        except (ScriptError, ValueError):
            return None
        return cluster if health.get("status") == "ok" else None


def _script(block: str) -> str:
    before = "" if block == "secrets" else blocks()["environment"]
    return before + blocks()[block]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    folder = tmp_path_factory.mktemp("day")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EXPERTSCALE_"))}
    kept |= {"SECRETS": str(folder / "secrets"), "DATA": str(folder / "prometheus"), "no_proxy": "*"}
    with ExitStack() as undo:
        try:
            made = undo.enter_context(machines(list(NODES), kept))
        except NotAllowedError as error:
            pytest.skip(f"no namespaces to be had: {error}")
        own = {"HEAD": made["head"].address}
        for name, machine in made.items():
            made[name] = Machine(
                name, machine.address, machine.pid, {**kept, **own, "NODE": machine.address, "POOL": name}
            )
        day = Day(made, folder)
        day.run("head", "secrets")
        for name in NODES:
            day.start(name)
        undo.enter_context(inside(made["head"]))
        yield day


def test_every_block_of_commands_is_run_here() -> None:
    """What is not named would be run by nobody."""
    run = {"secrets", "environment", "head", "worker", "nodes", "deploy", "look", "watch", "take away"}
    assert set(blocks()) == run
    assert len(re.findall(r"^```", DOCUMENT.read_text(), re.MULTILINE)) == 2 * len(blocks())


@pytest.fixture(scope="module")
def deployed(day: Day) -> Day:
    wait_for(day.is_complete, NODES_S, "three nodes")
    day.run("head", "deploy")
    try:
        wait_for(day.cluster, READY_S, "everything ready")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{day.run('head', 'look')}") from None
    return day


@pytest.fixture(scope="module")
def wanted(whole_model: WholeModel) -> dict[Asked, str]:
    """Requests of two domains, and what the whole model says."""
    asked = [Asked(prompt, None, TOKENS) for domain in ("python", "chinese") for prompt in PROMPTS[domain][:4]]
    return {each: whole_model.continued(each.prompt, each.max_tokens) for each in asked}


def test_groups_are_on_the_nodes_their_selectors_name(deployed: Day) -> None:
    on = {name: _parts(machine) for name, machine in deployed.machines.items()}
    assert {"Router", "Ingress"} <= on["head"]
    assert {name: {part for part in parts if part.startswith("experts")} for name, parts in on.items()} == {
        "head": set(),
        "large": {"experts-0-large", "experts-1-large"},
        "small": {"experts-1"},
    }


def test_http_and_the_dashboard_are_for_the_head_alone(deployed: Day, record_property: Any) -> None:
    opened = {name: machine.open_ports() for name, machine in deployed.machines.items()}
    assert 6379 in opened["head"]
    assert not {PORT, 8265} & set.union(*opened.values())
    record_property("open ports", {name: len(ports) for name, ports in opened.items()})


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's prometheus is not installed")
def test_prometheus_scrapes_every_node(deployed: Day) -> None:
    deployed.machines["head"].start(_script("watch"), deployed.logs / "prometheus.log")
    wanted = sorted(machine.address for machine in deployed.machines.values())
    wait_for(lambda: set(_scraped()) >= set(wanted), SCRAPED_S, "a sample of every node")


def _scraped() -> list[str]:
    """The addresses of all targets that answered Prometheus."""
    try:
        with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/targets", timeout=5) as response:
            targets = json.load(response)["data"]["activeTargets"]
    except OSError:
        return []
    return [each["labels"]["instance"].rpartition(":")[0] for each in targets if each["health"] == "up"]


def test_rows_cross_the_wires_and_the_tokens_are_those_of_the_whole_model(
    deployed: Day, wanted: dict[Asked, str], record_property: Any
) -> None:
    before, sent = _carried(deployed), _sent(deployed)
    streams = Streams(PORT, list(wanted))
    with streams.running():
        pass
    assert not streams.differences(wanted)
    # The last token of a stream is never sent; tokens of prompts, and headers, come on top.
    shape = read_shape(CHECKPOINT, "float32")
    tokens = sum(told.tokens - 1 for told in streams.told)
    sized = tokens * len(shape.experts) * traffic(shape).token_layer_bytes
    wait_for(lambda: _sent(deployed) - sent >= sized, 10, "the router's report of its bytes")
    rows_bytes, wire_bytes = _sent(deployed) - sent, _carried(deployed) - before
    record_property("bytes of rows, against what sizing says of the tokens generated", round(rows_bytes / sized, 2))
    record_property("bytes on the wires for each of them", round(wire_bytes / rows_bytes, 2))
    assert rows_bytes <= MOST_BESIDE * sized
    assert wire_bytes >= rows_bytes


def test_a_node_is_taken_away_under_load_and_brought_back(
    deployed: Day, wanted: dict[Asked, str], record_property: Any
) -> None:
    streams = Streams(PORT, list(wanted))
    with streams.running():
        since = time.monotonic()
        leaving = threading.Thread(target=deployed.run, args=("small", "take away"))
        leaving.start()
        wait_for(lambda: not _parts(deployed.machines["small"]), LEAVING_S, "nothing left on the node")
        alive = streams.alive
        leaving.join(LEAVING_S)
        assert alive, "the streams ended before the node did"
    assert not streams.differences(wanted)
    stall_s = streams.stall_s(since)
    record_property("longest wait when the node went s", round(stall_s, 2))
    assert stall_s <= STALL_S
    wait_for(lambda: _replicas(deployed) == [("experts-0", "large"), ("experts-1", "large")], 30, "the loss seen")
    back_at = time.monotonic()
    deployed.start("small")
    wait_for(lambda: ("experts-1", "default") in _replicas(deployed), BACK_S, "the group back")
    record_property("until the group was back s", round(time.monotonic() - back_at, 1))
    rows = _rows(deployed, "default")
    again = Streams(PORT, list(wanted))
    with again.running():
        pass
    assert not again.differences(wanted)
    wait_for(lambda: _rows(deployed, "default") > rows, 10, "rows on the node that came back")


def _parts(machine: Machine) -> set[str]:
    """The Serve deployments with a replica there: their processes are called `ray::ServeReplica:APP:DEPLOYMENT`."""
    return {
        line.rpartition(":")[2].split(".")[0] for line in machine.commands() if line.startswith("ray::ServeReplica:")
    }


def _carried(day: Day) -> int:
    """Bytes on both wires."""
    return sum(carried_bytes(day.machines["head"], number) for number in range(2))


def _sent(day: Day) -> int:
    cluster = wait_for(day.cluster, 30, "the cluster's answer")
    return int(cluster["transport_bytes"]["stream"])


def _replicas(day: Day) -> list[tuple[str, str]]:
    """(group, pool) of every ready replica."""
    cluster = day.cluster() or {"groups": []}
    return sorted(
        (group["name"], replica["pool"])
        for group in cluster["groups"]
        for replica in group["replicas"]
        if replica["state"] == "ready"
    )


def _rows(day: Day, pool: str) -> int:
    """That the replicas of a pool have computed."""
    cluster = wait_for(day.cluster, 30, "the cluster's answer")
    return sum(
        replica["rows"] or 0 for group in cluster["groups"] for replica in group["replicas"] if replica["pool"] == pool
    )

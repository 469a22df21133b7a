"""Two kinds of device in one cluster, and a third that never comes: growth goes where it can, rows by speed.

The cluster is Ray's own double of several nodes on one machine. Nodes carry labels and accelerators that are not there;
each pool's speed is emulated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import WholeModel
from tests.e2e.elastic import Elastic, elastic_server
from tests.e2e.load import Load, references
from tests.e2e.nodes import TOKEN, nodes
from tests.serving import wait_for

HOT = "experts-2"
SPEEDS = {"default": 1000, "t4": 400, "ghost": 4000}
STARTUP_S, BACKOFF_S = 12, 60
MEASURED_S = 10.0
IMBALANCE = 1.2


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory, whole_model: WholeModel) -> Iterator[Elastic]:
    wanted = references(whole_model.complete)
    folder = tmp_path_factory.mktemp("pools")
    kinds = {"l4": {"accelerator_type:L4": 4.0}, "t4": {"accelerator_type:T4": 4.0}}
    with (
        nodes(kinds, folder / "nodes.log") as cluster,
        elastic_server(
            folder,
            lambda server: Load(server, wanted),
            change=two_pools,
            environment={"RAY_ADDRESS": cluster.address, **TOKEN},
        ) as running,
    ):
        yield running


def two_pools(config: dict[str, Any], policy: dict[str, Any]) -> None:
    """Groups are at home on L4s, of which the budget gives four; T4s are slower, ghosts fast, cheap and not there."""
    experts = config["applications"][0]["args"]["experts"]
    experts["resources"] = {"accelerator_type": "L4", "label_selector": {"kind": "l4"}}
    experts["emulate"] = {"rows_per_s": SPEEDS["default"]}
    experts["pools"] = {
        "t4": {
            "resources": {"accelerator_type": "T4", "label_selector": {"kind": "t4"}},
            "emulate": {"rows_per_s": SPEEDS["t4"]},
        },
        "ghost": {"resources": {"label_selector": {"kind": "ghost"}}, "emulate": {"rows_per_s": SPEEDS["ghost"]}},
    }
    policy["budget"] = {"replicas": {"default": 4, "t4": 1, "ghost": 4}, "cpus": "cluster"}
    policy["pools"] = {"ghost": {"cost": 0.1}, "t4": {"cost": 0.2}}
    policy["defaults"] |= {"max_replicas": 2, "startup": {"budget_s": STARTUP_S, "backoff_s": BACKOFF_S}}


def test_outside_kubernetes_the_cluster_is_rays_own_nodes(elastic: Elastic) -> None:
    """The Serve controller's own thread has asked Ray: 4 CPUs on the head and on each node; ghosts are nowhere."""
    policy = wait_for(lambda: known_cluster(elastic), 30, "a report of the cluster")
    assert policy["cluster"]["source"] == "ray"
    assert policy["cluster"]["troubles"] == []
    assert [node["cpus"] for node in policy["cluster"]["nodes"]] == [4.0, 4.0, 4.0]
    (note,) = (each for each in policy["held_back"] if each.startswith("budget."))
    assert note == "budget.cpus: no machine of the cluster has the labels that replicas of pool ghost ask for"


def test_growth_that_fails_is_rolled_back_and_the_pool_that_is_there_takes_rows_by_its_speed(
    elastic: Elastic, record_property: Any
) -> None:
    started_at = time.time()
    with elastic.load.clients("chinese", 8):
        gave_up = wait_for(lambda: given_up(elastic, started_at), 60, "the ghost given up")
        assert f"{BACKOFF_S}" in gave_up["reason"]
        wait_for(lambda: pools(elastic) == ["default", "t4"], 60, "a replica in the pool that is there")
        wait_for(lambda: all(replica["rows"] for replica in replicas(elastic)), 30, "rows on both")
        before = {replica["id"]: replica["rows"] for replica in replicas(elastic)}
        time.sleep(MEASURED_S)  # what is measured lasts that long
        after = replicas(elastic)
    finish_s = {each["pool"]: (each["rows"] - before[each["id"]]) / each["speed_rows_per_s"] for each in after}
    imbalance = max(finish_s.values()) / (sum(finish_s.values()) / len(finish_s))
    record_property("imbalance of finish times, two pools", round(imbalance, 3))
    assert imbalance <= IMBALANCE
    assert {each["pool"]: each["speed_rows_per_s"] for each in after} == {k: SPEEDS[k] for k in ("default", "t4")}
    assert not elastic.load.failures
    asked = [each for each in elastic.decisions(gave_up["time"]) if each["pool"] == "ghost" and each["to"] > 0]
    assert all(each["time"] - gave_up["time"] >= BACKOFF_S for each in asked)


def known_cluster(elastic: Elastic) -> dict[str, Any] | None:
    """The policy's part of `/v1/cluster`, once the cluster under it is known."""
    policy: dict[str, Any] = elastic.cluster()["policy"] or {}
    return policy if (policy.get("cluster") or {}).get("nodes") else None


def given_up(elastic: Elastic, since: float) -> dict[str, Any] | None:
    """The decision that took back the ghost replica."""
    found = [each for each in elastic.decisions(since) if each["pool"] == "ghost" and each["to"] < each["from"]]
    return found[0] if found else None


def replicas(elastic: Elastic) -> list[dict[str, Any]]:
    """The ready replicas of the hot group."""
    return [each for each in elastic.group(HOT)["replicas"] if each["state"] == "ready"]


def pools(elastic: Elastic) -> list[str]:
    return sorted(each["pool"] for each in replicas(elastic))

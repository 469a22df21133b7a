"""Worker groups and nodes as the API's objects say them. Pure; milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.nodes.inventory import HEAD, UNBOUNDED, NodePool, node_of, node_pools, offers, quantity, worker_groups
from cluster.nodes.offers import capacity
from tests.cluster.nodes.objects import node, raycluster, worker_group


def one(group: dict[str, Any], **more: Any) -> Any:
    return worker_groups(raycluster("c", group, **more))[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", 0.5), ("4", 4), (4, 4), (2.5, 2.5), ("1k", 1000), ("2Ki", 2048), ("1Gi", 2**30), (None, 0)],
)
def test_quantities_are_numbers(text: Any, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "-3", "1e999", "nan", "4X", [], {}])
def test_what_is_no_quantity_counts_as_nothing(text: Any) -> None:
    assert quantity(text) == 0


def test_type_count_limits_and_price_of_a_worker_group() -> None:
    found = one(worker_group("l4", 1, 4, gpus=2, type_="L4", price="0.8", replicas=3))
    assert found.as_json() == {
        "name": "l4",
        "type": "L4",
        "gpus_each": 2.0,
        "replicas": 3,
        "min_replicas": 1,
        "max_replicas": 4,
        "price_per_hour": 0.8,
    }
    assert (found.offer.most, found.cpus) == (4, 8)


def test_what_ray_is_told_comes_in_kuberays_order() -> None:
    stated = worker_group("a", resources={"GPU": "4", "CPU": "16"}, rayStartParams={"num-gpus": "2"})
    assert (one(stated).gpus, one(stated).cpus) == (4, 16)
    started = worker_group("a", rayStartParams={"num-gpus": "2", "num-cpus": "3"})
    assert (one(started).gpus, one(started).cpus) == (2, 3)
    requested = worker_group("a", gpus=0)
    requested["template"]["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "1500m"}}
    assert (one(requested).gpus, one(requested).cpus) == (0, 2)


def test_all_hosts_of_a_replica_count() -> None:
    assert one(worker_group("a", gpus=8, numOfHosts=2)).gpus == 16


def test_how_many_there_can_be() -> None:
    assert one(worker_group("a", 1, 4)).most == 4
    assert one(worker_group("a", 1, 4, replicas=2), grows=False).most == 2, "nobody would raise `replicas`"
    assert one(worker_group("a", 1, 4, suspend=True)).most == 0
    unbounded = worker_group("a", 1)
    del unbounded["maxReplicas"]
    assert one(unbounded).most == UNBOUNDED


def test_a_head_that_runs_replicas_is_one_machine() -> None:
    cluster = raycluster("c", worker_group("a"))
    cluster["spec"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": "4"}
    head, worker = worker_groups(cluster)
    assert (head.name, head.index, head.most, head.cpus) == (HEAD, None, 1, 4)
    assert worker.index == 0


@pytest.mark.parametrize("price", ["dear", "-1", "nan", "inf", ""])
def test_what_is_no_price_is_unknown(price: str) -> None:
    assert one(worker_group("a", price=price)).price_per_hour is None


def test_gpu_nodes_alike_are_a_pool() -> None:
    pool = {"eksDOTamazonawsDOTcom__nodegroup": "l4s", "nvidiaDOTcom__gpuDOTproduct": "NVIDIA-L4"}
    listed = [
        node("a", 4, **pool, expertscaleDOTio__price_per_hour="3.2"),
        node("b", 4, **pool, expertscaleDOTio__price_per_hour="3.2", ready=False),
        node("c", 8, karpenterDOTsh__nodepool="h100", closed=True),
        node("d", 0),
        node("e", 1, expertscaleDOTio__pool="a10", expertscaleDOTio__gpu="A10"),
    ]
    assert set(node_pools(map(node_of, listed))) == {
        NodePool("l4s", "NVIDIA-L4", 3.2, 2, 1, 4.0),
        NodePool("h100", None, None, 1, 0, 0.0),
        NodePool("a10", "A10", None, 1, 1, 1.0),
    }


def test_by_nodes_a_group_offers_what_its_node_selector_finds() -> None:
    groups = worker_groups(
        raycluster(
            "c",
            worker_group("l4", 0, 9, node_selector={"kind": "l4"}),
            worker_group("h100", 0, 1, gpus=4, node_selector={"kind": "h100"}),
            worker_group("any", 0, 9, gpus=2),
        )
    )
    nodes = [
        node("a", 2, kind="l4"),
        node("b", 1, kind="l4"),
        node("c", 1, kind="l4", ready=False),
        node("d", 8, kind="h100"),
        node("e", 3),
        node("f", 0),
    ]
    by_nodes = offers(groups, map(node_of, nodes))
    found = {offer.name: offer.most for offer in by_nodes}
    # Two pods of 8 CPUs would take 16 of node a's 15.8: one fits. Node d has room for one pod of the two it could hold.
    # What selects nothing has room on all with two GPUs, and all together use no node twice.
    assert found == {"l4": 2, "h100": 1, "any": 3}
    assert capacity(by_nodes, "gpus", {}).total == 2 * 1 + 1 * 4 + 1 * 2
    assert {offer.name: offer.most for offer in offers(groups)} == {"l4": 9, "h100": 1, "any": 9}


def test_by_nodes_pods_are_placed_by_what_they_request() -> None:
    group = worker_group("a", 0, 9)
    pod = group["template"]["spec"]
    pod["containers"][0]["resources"]["requests"] = {"cpu": "4", "memory": "20Gi"}
    nodes = [node_of(node("n", 4))]
    # Of 15.8 CPUs and 60 GiB: three, and of 8 CPUs each one.
    assert offers([one(group)], nodes)[0].most == 3
    assert one(group).cpus == 8, "Ray goes by the limits"
    pod["containers"].append({"name": "beside", "resources": {"requests": {"cpu": "2"}}})
    assert offers([one(group)], nodes)[0].most == 2
    pod["initContainers"] = [{"name": "first", "resources": {"requests": {"cpu": "9"}}}]
    assert offers([one(group)], nodes)[0].most == 1
    pod["initContainers"][0]["resources"]["requests"] = {"memory": "61Gi"}
    assert offers([one(group)], nodes)[0].most == 0


def test_by_nodes_a_machine_of_several_hosts_takes_a_node_each() -> None:
    group = one(worker_group("a", 0, 9, gpus=8, numOfHosts=2))
    found = offers([group], [node_of(node(name, 8)) for name in "abc"])
    assert found[0].most == 1
    assert capacity(found, "gpus", {}).total == 16


def test_groups_that_share_nodes_have_all_of_them_each_and_once_together() -> None:
    # One of the first and four of the second run here.
    shared = [worker_group(name, 1, most, node_selector={"kind": "l4"}) for name, most in (("r", 4), ("e", 6))]
    groups = worker_groups(raycluster("c", *[group | {"labels": {"pool": group["groupName"]}} for group in shared]))
    by_nodes = offers(groups, [node_of(node(name, 1, kind="l4")) for name in "abcde"])
    found = capacity(by_nodes, "gpus", {"router": [{"pool": "r"}], "experts": [{"pool": "e"}], "both": [{}]})
    assert found.total == 5
    assert found.pools == {"router": 4, "experts": 5, "both": 5}


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(junk, junk)
def test_odd_numbers_of_a_worker_group_are_counts_all_the_same(least: Any, most: Any) -> None:
    found = one(worker_group("a") | {"minReplicas": least, "maxReplicas": most})
    assert found.minimum >= 0
    assert found.maximum >= 0

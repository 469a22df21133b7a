"""The inventory reads the chart's worker groups as Ray's own autoscaler does, and finds a machine for every replica."""

from __future__ import annotations

from typing import Any

import pytest

from autoscale.cluster_budget import Budget, Given, budget_of
from autoscale.fleet import fleet_of
from autoscale.spec import PolicySpec
from cluster.nodes.inventory import HEAD, Node, node_of, offers, quantity, worker_groups
from cluster.nodes.prewarm import Seat, machines, plan
from tests.cluster.nodes.objects import raycluster, worker_group
from tests.helm.charts import Document, ci, ray_service
from tests.helm.test_node_groups import CASES, args_of, node_types


def child(service: Document) -> dict[str, Any]:
    """The RayCluster that KubeRay makes of a RayService."""
    metadata = {"name": "mixed-abcde", "resourceVersion": "1"}
    return {"kind": "RayCluster", "metadata": metadata, "spec": service["spec"]["rayClusterConfig"]}


def agrees_with_ray(service: Document) -> None:
    types = node_types(service)
    for group in worker_groups(child(service)):
        known = types["headgroup" if group.name == HEAD else group.name]
        assert group.gpus == known.resources.get("GPU", 0), group.name
        assert group.cpus == known.resources.get("CPU", 0), group.name
        if group.name != HEAD:
            assert (group.minimum, group.most) == (known.min_worker_nodes, known.max_worker_nodes)
            assert group.labels.items() <= known.labels.items()


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_resources_labels_and_bounds_are_those_ray_s_autoscaler_knows(values: Document) -> None:
    agrees_with_ray(ray_service(values))


@pytest.mark.parametrize(
    "more",
    [
        {"rayStartParams": {"num-gpus": "3", "num-cpus": "5"}},
        {"resources": {"GPU": "2", "CPU": "6"}},
        {"gpus": 0},
        {"gpus": 8},
    ],
)
def test_so_are_those_of_groups_written_otherwise(more: dict[str, Any]) -> None:
    agrees_with_ray({"spec": {"rayClusterConfig": raycluster("c", worker_group("a", 1, 3, **more))["spec"]}})


def budget(service: Document, word: str, nodes: list[Node] | None = None) -> Budget:
    """What a policy that leaves its budget to the cluster may use."""
    fleet = fleet_of(args_of(service))
    given = Given("kubernetes", offers(worker_groups(child(service)), nodes), at=0.0, by_nodes=nodes is not None)
    takes_gpus = any(unit.gpus for unit in [*fleet.units.values(), *(unit for unit, _ in fleet.fixed)])
    asked = {"gpus": word, "cpus": word} if takes_gpus else {"cpus": word}
    return budget_of(PolicySpec.model_validate({"version": 1, "budget": asked}), fleet, given, 0.0)


def machines_of(service: Document) -> list[Node]:
    """For each pod there may be a node of the size that its limits are made for, less what the node itself needs."""
    found = []
    for group in child(service)["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        status = {
            "allocatable": limits | {"cpu": quantity(limits["cpu"]) - 0.1},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        for number in range(group["maxReplicas"]):
            metadata = {"name": f"{group['groupName']}-{number}", "labels": pod.get("nodeSelector", {})}
            found.append(node_of({"metadata": metadata, "status": status}))
    return found


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_pool_has_machines(values: Document) -> None:
    found = budget(ray_service(values), "cluster")
    assert found.notes == ()
    assert found.amounts


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_by_nodes_as_many_as_there_may_be_are_as_good_as_the_cluster(values: Document) -> None:
    service = ray_service(values)
    nodes = machines_of(service)
    found = budget(service, "nodes", nodes)
    assert found.notes == ()
    assert found.amounts
    together = budget(service, "cluster").amounts
    assert together is not None
    assert found.amounts["cpus", None] == together["cpus", None]
    assert found.amounts.get(("gpus", None)) == together.get(("gpus", None))


def test_by_nodes_routers_and_experts_share_the_pool_of_ack() -> None:
    service = ray_service(ci("alibaba-cloud"))
    nodes = [node for node in machines_of(service) if node.labels == {"expertscale.io/pool": "a10"}][:5]
    assert [node.room.cpus for node in nodes] == [7.9] * 5
    found = budget(service, "nodes", nodes)
    assert found.amounts == {
        ("gpus", None): 5,
        ("gpus", "default"): 5,
        ("cpus", None): 40,
        ("cpus", "default"): 40,
    }


def test_the_mixed_fleet_s_budget_is_what_its_values_say_by_hand() -> None:
    service = ray_service(ci("mixed-gpu"))
    given = Given("kubernetes", offers(worker_groups(child(service))), at=0.0)
    spec = PolicySpec.model_validate({"version": 1, "budget": {"gpus": "cluster"}})
    found = budget_of(spec, fleet_of(args_of(service)), given, 0.0)
    # 12 L4s for experts and 4 A10Gs for routers, which count at home, and 2 H100s.
    assert found.amounts == {("gpus", None): 18, ("gpus", "default"): 16, ("gpus", "h100"): 2}


def test_a_peak_raises_the_group_its_replicas_run_on() -> None:
    service = ray_service(ci("mixed-gpu"))
    fleet = fleet_of(args_of(service))
    home, fast = fleet.of("experts-0")
    seats = [Seat(unit.name, count, unit.gpus, unit.cpus, unit.selector) for unit, count in ((home, 6), (fast, 3))]
    wanted, notes = machines(seats, worker_groups(child(service)))
    assert (wanted, notes) == ({"l4": 6, "h100": 2}, ())
    changed = {each["path"]: each["value"] for each in plan(child(service), wanted, True).patch}
    assert changed["/spec/workerGroupSpecs/1/minReplicas"] == 6
    assert changed["/spec/workerGroupSpecs/2/minReplicas"] == 2

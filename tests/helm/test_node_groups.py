"""Ray's own autoscaler reads the worker groups: what it takes them for, which of them it starts for our replicas."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from cluster.config import AppConfig, ResourceSpec, parse_args
from cluster.nodes.inventory import worker_groups
from tests.helm.charts import CI_FILES, Document, Refused, ci, merged, ray_service, render

CASES = {name.removesuffix("-values.yaml"): ci(name.removesuffix("-values.yaml")) for name in CI_FILES}


def node_types(service: Document) -> dict[str, Any]:
    """Group -> what Ray's autoscaler knows of its nodes."""
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": service["spec"]["rayClusterConfig"]}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)
    return config.get_node_type_configs()


def started(service: Document, demands: list[ResourceSpec]) -> tuple[Counter[str], int]:
    """(group -> nodes that Ray's autoscaler would have for `demands`, how many demands it could never meet)."""
    types = node_types(service)
    requests = [ResourceRequestUtil.make(*_demand(demand)) for demand in demands]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=100,
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    return nodes, len(reply.infeasible_resource_requests)


def _demand(spec: ResourceSpec) -> tuple[dict[str, float], None, list[list[tuple[str, int, list[str]]]] | None]:
    options = spec.ray_actor_options()
    bundle = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options.get("resources", {})}
    wanted = LabelSelectorOperator.LABEL_OPERATOR_IN
    selector = [(key, wanted, [value]) for key, value in options.get("label_selector", {}).items()]
    return {name: count for name, count in bundle.items() if count}, None, [selector] if selector else None


def replicas(args: AppConfig) -> list[ResourceSpec]:
    """What the application asks for at its start: one replica of each group at home, routers, ingress, Directory."""
    experts = args.experts
    groups = [experts.resources for name in experts.group_names for _ in range(experts.replicas_of(name))]
    routers = [args.router.resources] * (args.router.replicas if isinstance(args.router.replicas, int) else 1)
    return [*groups, *routers, *[args.ingress.resources] * args.ingress.replicas, ResourceSpec()]


def args_of(service: Document) -> AppConfig:
    return parse_args(yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"])


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_replica_has_a_group_that_can_hold_it_and_groups_are_large_enough(values: Document) -> None:
    service = ray_service(values)
    args = args_of(service)
    demands = replicas(args)
    demands += [pool.resources for pool in args.experts.pools.values()]
    nodes, never = started(service, demands)
    assert never == 0
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert nodes[group["groupName"]] <= group["maxReplicas"]


def test_a_replica_that_no_group_can_hold_is_found() -> None:
    service = ray_service(ci("mixed-gpu"))
    assert started(service, [ResourceSpec(num_cpus=64)])[1] == 1
    assert started(service, [ResourceSpec(num_gpus=1, label_selector={"expertscale.io/pool": "b200"})])[1] == 1


def test_groups_are_to_ray_what_the_values_say() -> None:
    types = node_types(ray_service(ci("mixed-gpu")))
    assert list(types) == ["headgroup", "a10g", "l4", "h100"]
    assert types["headgroup"].resources["CPU"] == 0
    l4 = types["l4"]
    assert l4.resources == {"CPU": 4, "GPU": 1, "memory": 12 << 30}
    assert (l4.min_worker_nodes, l4.max_worker_nodes, l4.idle_timeout_s, l4.priority) == (4, 12, 600, 10)
    assert l4.labels == {"expertscale.io/pool": "l4", "ray.io/accelerator-type": "L4"}


def test_groups_are_to_the_inventory_what_the_values_say() -> None:
    """What a policy's `budget: {gpus: cluster}` counts, and pre-warming raises, by their place in the list."""
    spec = ray_service(ci("mixed-gpu"))["spec"]["rayClusterConfig"]
    groups = {group.name: group for group in worker_groups({"spec": spec})}
    assert {name: group.index for name, group in groups.items()} == {"a10g": 0, "l4": 1, "h100": 2}
    assert (groups["l4"].minimum, groups["l4"].most, groups["l4"].gpus) == (4, 12, 1)
    assert groups["h100"].as_json()["type"] == "H100"
    assert groups["h100"].price_per_hour == 6.4


def test_a_replica_in_a_pool_starts_a_node_of_that_pool_from_none() -> None:
    service = ray_service(ci("mixed-gpu"))
    args = args_of(service)
    before, _ = started(service, replicas(args))
    after, never = started(service, [*replicas(args), args.experts.pools["h100"].resources])
    assert before["h100"] == 0
    assert after["h100"] == 1
    assert never == 0


@pytest.mark.parametrize(
    ("asked", "groups", "fits"),
    [
        ({"label_selector": {"expertscale.io/pool": "x"}}, {"labels": {"expertscale.io/pool": "x"}}, True),
        ({"label_selector": {"expertscale.io/pool": "x"}}, {"labels": {"expertscale.io/pool": "y"}}, False),
        ({"label_selector": {"expertscale.io/pool": "!x"}}, {}, True),
        ({"num_gpus": 1}, {"resources": {"limits": {"cpu": 1}}}, False),
        ({"num_gpus": 1}, {"resources": {"limits": {"cpu": 1, "nvidia.com/gpu": 1}}}, True),
        ({"num_gpus": 1}, {"rayResources": {"GPU": "1", "CPU": "1"}}, True),
        ({"num_gpus": 2}, {"resources": {"limits": {"cpu": 1, "nvidia.com/gpu": 1}}}, False),
        ({"accelerator_type": "L4"}, {}, False),
        ({"accelerator_type": "L4"}, {"rayResources": {"accelerator_type:L4": "1", "CPU": "4"}}, True),
        ({"resources": {"nvme": 1}}, {"rayResources": {"nvme": "1", "CPU": "4"}}, True),
    ],
)
def test_what_no_group_has_is_refused_when_the_chart_is_rendered(asked: Document, groups: Document, fits: bool) -> None:
    group = {"name": "g", "minReplicas": 0, "maxReplicas": 1, "resources": {"limits": {"cpu": 4}}, **groups}
    values = merged(
        ci("minimal-cpu"), {"serve": {"experts": {"resources": asked}}, "workerGroups": {"experts": [group]}}
    )
    if fits:
        ray_service(values)
        return
    with pytest.raises(Refused, match=r"serve\.experts\.resources: no worker group has what it asks for"):
        render(values)

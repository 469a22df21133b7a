"""Which units a configuration gives the policy to scale."""

from __future__ import annotations

from autoscale.fleet import fleet_of
from cluster.config import parse_args

MODEL = {"path": "somewhere"}


def test_every_group_has_a_unit_in_every_pool_and_the_routers_are_one():
    fleet = fleet_of(
        parse_args(
            {
                "model": MODEL,
                "experts": {
                    "groups": 2,
                    "replicas": "elastic",
                    "max_replicas_hard": 6,
                    "resources": {"num_cpus": 2, "num_gpus": 1},
                    "pools": {"h100": {"resources": {"num_gpus": 0.5}, "emulate": {"rows_per_s": 300}}},
                },
                "router": {"replicas": "elastic", "resources": {"num_gpus": 2}},
            }
        )
    )
    assert list(fleet.units) == ["experts-0", "experts-0-h100", "experts-1", "experts-1-h100", "Router"]
    assert fleet.groups == ("experts-0", "experts-1")
    assert fleet.max_replicas_hard == 6
    home, pool = fleet.of("experts-1")
    assert (home.name, home.pool, home.gpus, home.cpus, home.speed_rows_per_s) == ("experts-1", "default", 1, 2, None)
    assert (pool.name, pool.pool, pool.gpus, pool.speed_rows_per_s) == ("experts-1-h100", "h100", 0.5, 300)
    assert (fleet.units["Router"].group, fleet.units["Router"].gpus) == (None, 2)


def test_fixed_numbers_are_nobody_s_to_change():
    fixed = fleet_of(parse_args({"model": MODEL, "experts": {"groups": 2, "replicas": {"experts-1": 3}}}))
    assert not fixed.units
    assert [(unit.name, count) for unit, count in fixed.fixed] == [("experts-0", 1), ("experts-1", 3), ("Router", 1)]
    only_experts = fleet_of(parse_args({"model": MODEL, "experts": {"replicas": "elastic", "groups": 1}}))
    assert list(only_experts.units) == ["experts-0"]
    assert [unit.name for unit, _ in only_experts.fixed] == ["Router"]
    only_routers = fleet_of(parse_args({"model": MODEL, "router": {"replicas": "elastic"}}))
    assert list(only_routers.units) == ["Router"]


def test_a_unit_knows_the_labels_of_the_nodes_it_may_run_on():
    resources = {"accelerator_type": "L4", "label_selector": {"zone": "in(a,b)"}}
    (unit,) = fleet_of(
        parse_args({"model": MODEL, "experts": {"groups": 1, "replicas": "elastic", "resources": resources}})
    ).units.values()
    assert unit.selector == {"ray.io/accelerator-type": "L4", "zone": "in(a,b)"}

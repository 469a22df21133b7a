"""What there is to scale, by the arguments of the application: one unit per (group, pool), and the routers. Pure."""

from __future__ import annotations

from autoscale.signals import ROUTER, Fleet, UnitFacts
from cluster.config import HOME_POOL, AppConfig, EmulateSpec, ResourceSpec, deployment_name
from cluster.nodes.offers import ACCELERATOR_LABEL


def fleet_of(config: AppConfig) -> Fleet:
    """The fleet of a configuration. What it gives a fixed number of replicas is there only to be counted."""
    experts, router = config.experts, config.router
    units: list[UnitFacts] = []
    fixed: list[tuple[UnitFacts, int]] = []
    kinds = {HOME_POOL: (experts.resources, experts.emulate)}
    kinds |= {name: (pool.resources, pool.emulate) for name, pool in experts.pools.items()}
    if experts.transport == "local":
        kinds = {}  # the routers hold the experts themselves
    for group in experts.group_names:
        for pool, kind in kinds.items():
            unit = _unit(deployment_name(group, pool), group, pool, *kind)
            if experts.elastic:
                units.append(unit)
            else:
                fixed.append((unit, experts.replicas_of(group, pool)))
    routers = _unit(ROUTER, None, HOME_POOL, router.resources, None)
    if isinstance(router.replicas, int):
        fixed.append((routers, router.replicas))
    else:
        units.append(routers)
    return Fleet({unit.name: unit for unit in units}, experts.max_replicas_hard, tuple(fixed))


def _unit(name: str, group: str | None, pool: str, resources: ResourceSpec, emulate: EmulateSpec | None) -> UnitFacts:
    accelerator = {} if resources.accelerator_type is None else {ACCELERATOR_LABEL: resources.accelerator_type}
    return UnitFacts(
        name=name,
        group=group,
        pool=pool,
        gpus=resources.num_gpus,
        cpus=resources.num_cpus,
        speed_rows_per_s=emulate.rows_per_s if emulate else None,
        selector={**accelerator, **resources.label_selector},
    )

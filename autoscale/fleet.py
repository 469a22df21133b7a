"""What there is to scale, by the arguments of the application: one unit per (group, pool), and the routers. Pure."""

from __future__ import annotations

from autoscale.signals import ROUTER, Fleet, UnitFacts
from cluster.config import HOME_POOL, AppConfig, EmulateSpec, ResourceSpec, deployment_name


def fleet_of(config: AppConfig) -> Fleet:
    """The fleet of a configuration. Units whose number of replicas is fixed there are not in it."""
    experts, router = config.experts, config.router
    units: list[UnitFacts] = []
    if experts.elastic:
        kinds = {HOME_POOL: (experts.resources, experts.emulate)}
        kinds |= {name: (pool.resources, pool.emulate) for name, pool in experts.pools.items()}
        units += [
            _unit(deployment_name(group, pool), group, pool, *kind)
            for group in experts.group_names
            for pool, kind in kinds.items()
        ]
    if router.elastic:
        units.append(_unit(ROUTER, None, HOME_POOL, router.resources, None))
    return Fleet({unit.name: unit for unit in units}, experts.max_replicas_hard)


def _unit(name: str, group: str | None, pool: str, resources: ResourceSpec, emulate: EmulateSpec | None) -> UnitFacts:
    return UnitFacts(
        name=name,
        group=group,
        pool=pool,
        gpus=resources.num_gpus,
        cpus=resources.num_cpus,
        speed_rows_per_s=emulate.rows_per_s if emulate else None,
    )

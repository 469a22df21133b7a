"""What a policy asks for in vain, given the fleet it is for: names nobody has, bounds and budgets nobody can keep.

Serve's own bounds are part of the fleet: one replica of each group stays in its home pool whatever the policy says, and
no unit gets more than `max_replicas_hard`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from autoscale.signals import ROUTER, Fleet, UnitFacts
from autoscale.spec import PolicySpec
from cluster.config import HOME_POOL, Spec
from cluster.sentences import Fault

Cost = Literal["gpus", "cpus", "replicas"]
COSTS: tuple[Cost, ...] = ("gpus", "cpus", "replicas")
TINY = 1e-9
"""What sums of shares of a CPU may be off by."""


@dataclass(frozen=True)
class _Known:
    """A policy beside its fleet. where: "" for the file as it is, else which schedule entry is taken as active."""

    spec: PolicySpec
    fleet: Fleet
    where: str = ""

    @cached_property
    def pools(self) -> tuple[str, ...]:
        return tuple(sorted({HOME_POOL} | {unit.pool for unit in self.fleet.units.values()}))

    @cached_property
    def units(self) -> dict[str, dict[str, UnitFacts]]:
        """Group -> pool -> unit; `Fleet.of` looks at all units each time."""
        found: dict[str, dict[str, UnitFacts]] = {}
        for unit in self.fleet.units.values():
            if unit.group is not None:
                found.setdefault(unit.group, {})[unit.pool] = unit
        return found

    def pools_of(self, group: str) -> frozenset[str]:
        """The pools that are there and that `group` may run in."""
        there = frozenset(self.units[group])
        allowed = self.spec.scaling(group).pools
        return there if allowed is None else there & frozenset(allowed)


def check_against(spec: PolicySpec, fleet: Fleet) -> list[str]:
    """One sentence for each key of `spec`, as it was read, that does not suit the fleet.

    Budgets are compared with the minima of the file and of each schedule entry alone, in the cheapest pools. That finds
    what cannot be held; it does not prove that entries which overlap can be.
    """
    known = _Known(spec, fleet)
    faults = [*_unknown_names(known), *_pools_without_home(known), *_bounds(known), *_budgets(known)]
    for index, entry in enumerate(spec.schedule):
        faults += _budgets(_Known(spec.under((entry,)), fleet, f" with schedule.{index} active"))
    # Once per key: what the file breaks by itself, every schedule entry would break again.
    return [fault.sentence() for fault in {fault.key: fault for fault in reversed(faults)}.values()][::-1]


def _unknown_names(known: _Known) -> Iterator[Fault]:
    """Patterns that match no group, and pools that are not there."""
    spec, groups = known.spec, known.fleet.groups
    patterns = {f"groups.{index}.match": rule.match for index, rule in enumerate(spec.groups)}
    for index, entry in enumerate(spec.schedule):
        patterns |= {f"schedule.{index}.groups.{pattern}": pattern for pattern in entry.groups}
    for key, pattern in patterns.items():
        if not any(fnmatchcase(group, pattern) for group in groups):
            yield Fault(key, pattern, f"it matches none of the groups that scale, {_list(groups)}")
    for key, names in _pool_keys(spec).items():
        for name in names:
            if name not in known.pools:
                yield Fault(key, name, f"there is no such pool; the pools are {_list(known.pools)}")


def _pool_keys(spec: PolicySpec) -> dict[str, Iterable[str]]:
    """Key -> the names of pools that stand there."""
    keys: dict[str, Iterable[str]] = {"pools": spec.pools, "defaults.pools": spec.defaults.pools or ()}
    keys |= {f"groups.{index}.pools": rule.pools or () for index, rule in enumerate(spec.groups)}
    for cost in COSTS:
        limit = getattr(spec.budget, cost)
        keys[f"budget.{cost}"] = limit if isinstance(limit, dict) else ()
    return keys


def _pools_without_home(known: _Known) -> Iterator[Fault]:
    scalings = {"defaults": known.spec.defaults}
    scalings |= {f"groups.{index}": rule for index, rule in enumerate(known.spec.groups)}
    for key, scaling in scalings.items():
        if scaling.pools is not None and HOME_POOL not in scaling.pools:
            yield Fault(
                f"{key}.pools", list(scaling.pools), f"{HOME_POOL!r} must be among them: one replica always stays there"
            )


def _bounds(known: _Known) -> Iterator[Fault]:
    """Bounds that are written and exceed what Serve allows. A default that does is no mistake of the writer's."""
    hard = known.fleet.max_replicas_hard
    for key, bounds, pools in _bounds_by_key(known):
        for name in ("min_replicas", "max_replicas"):
            value = getattr(bounds, name) if name in bounds.model_fields_set else None
            if value is not None and value > hard * pools:
                most = f"{hard}" if pools == 1 else f"{hard * pools}, that is {hard} in each of {pools} pools"
                yield Fault(f"{key}.{name}", value, f"experts.max_replicas_hard allows 1 to {most}")


def _bounds_by_key(known: _Known) -> Iterator[tuple[str, Spec, int]]:
    """(key, what has bounds there, in how many pools whatever they bound may run), fewest where it differs."""
    spec, groups = known.spec, known.fleet.groups
    ruled = {group: spec.rule(group) for group in groups}
    concerned: list[tuple[str, Spec, list[str]]] = [
        ("defaults", spec.defaults, [g for g in groups if ruled[g] is None])
    ]
    for index, rule in enumerate(spec.groups):
        concerned.append((f"groups.{index}", rule, [group for group in groups if ruled[group] == index]))
    for index, entry in enumerate(spec.schedule):
        for pattern, bounds in entry.groups.items():
            matching = [group for group in groups if fnmatchcase(group, pattern)]
            concerned.append((f"schedule.{index}.groups.{pattern}", bounds, matching))
        if entry.router is not None and ROUTER in known.fleet.units:
            yield f"schedule.{index}.router", entry.router, 1
    for key, part, matching in concerned:
        if matching:
            yield key, part, min(len(known.pools_of(group)) or 1 for group in matching)
    if ROUTER in known.fleet.units:
        yield "router", spec.router, 1


def _budgets(known: _Known) -> Iterator[Fault]:
    """Budgets, and bounds of pools, that cannot hold the minimum of everything together."""
    for cost in COSTS:
        limit = getattr(known.spec.budget, cost)
        if isinstance(limit, dict):
            yield from _by_pool(known, cost, f"budget.{cost}", limit)
        elif not isinstance(limit, str | None) and (need := _need(known, cost, frozenset(known.pools))) > limit + TINY:
            yield _too_little(known, f"budget.{cost}", limit, need)
    bounded = {name: pool.max_replicas for name, pool in known.spec.pools.items() if pool.max_replicas is not None}
    yield from _by_pool(known, "replicas", "pools", bounded, ".max_replicas")


def _by_pool(known: _Known, cost: Cost, key: str, limits: Mapping[str, float], end: str = "") -> Iterator[Fault]:
    """The same for limits by pool: in the home pool, and in each set of pools that some group is confined to."""
    for pools in sorted({frozenset({HOME_POOL}), *map(known.pools_of, known.fleet.groups)}, key=sorted):
        if not pools <= limits.keys():
            continue
        limit, need = sum(limits[pool] for pool in pools), _need(known, cost, pools)
        if need > limit + TINY:
            place = f"{key}.{next(iter(pools))}{end}" if len(pools) == 1 else key
            yield _too_little(known, place, limit, need)


def _need(known: _Known, cost: Cost, pools: frozenset[str]) -> float:
    """The least that groups and routers take in `pools` together, whatever is decided."""
    need = 0.0
    for group in known.fleet.groups:
        prices = {pool: _price(unit, cost) for pool, unit in known.units[group].items()}
        home = 1 if HOME_POOL in prices and HOME_POOL in pools else 0
        need += home * prices.get(HOME_POOL, 0.0)
        if (allowed := known.pools_of(group)) and allowed <= pools:
            more = known.spec.scaling(group).min_replicas - home
            need += max(0, more) * min(prices[pool] for pool in allowed)
    router = known.fleet.units.get(ROUTER)
    if router is not None and router.pool in pools and cost != "replicas":
        need += known.spec.router.min_replicas * _price(router, cost)
    for unit, count in known.fleet.fixed:
        if unit.pool in pools and (cost != "replicas" or unit.group is not None):
            need += count * _price(unit, cost)
    return need


def _price(unit: UnitFacts, cost: Cost) -> float:
    return 1.0 if cost == "replicas" else unit.gpus if cost == "gpus" else unit.cpus


def _too_little(known: _Known, key: str, limit: float, need: float) -> Fault:
    written = int(limit) if float(limit).is_integer() else limit
    return Fault(key, written, f"Input should be at least {need:g}, which the minima of all together take{known.where}")


def _list(names: Iterable[str]) -> str:
    """ "a, b and 3 more"; at most ten are named."""
    names = list(names)
    named = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return named or "of which there are none"

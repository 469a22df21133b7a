"""What is scaled as one (a group over its pools, or the routers), as a working copy for one decision. Pure.

Capacity is what replicas of different pools have in common: rows per second for groups, replicas for the routers. A
pool nobody measured yet has the speed its configuration expects, else the mean of the group's other pools, else 1.

    growing     the pool with the most speed per cost that is allowed, has room and is not in back-off
    shrinking   first where the group may not run (any more), then the least speed per cost; never below the floor
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autoscale.needs import Need, is_usable
from autoscale.signals import Fleet, GroupLoad, Reason, Signals, UnitCounts, UnitFacts
from autoscale.spec import PolicySpec, PoolPolicy, RouterScaling, ScalingSpec
from cluster.config import deployment_name

MOST_REPLICAS = 1_000_000
"""Counts are clamped to this, so that absurd ones stay numbers."""
SPEED_RANGE = (1e-6, 1e12)
ROUNDING = 1e-9
NO_POLICY = PoolPolicy()


@dataclass(slots=True)
class Unit:
    """One unit in the making of a decision.

    before: the target as it was. target: as it is planned. floor, ceiling: what Serve itself allows.
    allowed: the policy lets the group run here. blocked: growth failed here and its back-off has not passed.
    reason, why: the kind of reason of the planned change, and the reason itself; written by `because`.
    """

    facts: UnitFacts
    ready: int
    before: int
    leaving: int
    target: int
    floor: int
    ceiling: int
    cost: float
    allowed: bool = True
    speed: float = 1.0
    blocked: bool = False
    reason: Reason | None = None
    why: str = ""

    def because(self, reason: Reason, why: str) -> None:
        """Why the planned target is what it is now."""
        self.reason, self.why = reason, why

    @property
    def held(self) -> int:
        """Devices that count as held: what was starting a moment ago may hold one even if it is taken back now."""
        return max(self.ready, self.before, self.target) + self.leaving

    @property
    def value(self) -> float:
        """Speed per cost; 0 where the group may not run."""
        return self.speed / self.cost if self.allowed else 0.0


@dataclass(slots=True)
class Scalable:
    """A group, or the routers (`group` None). load: None where missing. need: None where there is no decision by load.

    minimum, maximum: replicas in sum that the policy wants, where Serve's floors do not want more.
    ready_capacity: what answers now, wherever it runs. speed_known: False where nobody knows the speed of any pool, so
    that capacity is counted in replicas.
    """

    name: str
    group: str | None
    units: list[Unit]
    scaling: ScalingSpec | RouterScaling
    load: GroupLoad | None = None
    need: Need | None = None
    minimum: int = 1
    maximum: int = 1
    ready_capacity: float = 0.0
    speed_known: bool = False

    # Loops, not sums of generators: this is most of what a quiet decision does.
    @property
    def total(self) -> int:
        """Replicas planned, in all pools."""
        total = 0
        for unit in self.units:
            total += unit.target
        return total

    @property
    def capacity(self) -> float:
        """What is planned where the group may run: elsewhere replicas are on their way out."""
        capacity = 0.0
        for unit in self.units:
            if unit.allowed:
                capacity += unit.target * unit.speed
        return capacity

    def to_grow(self, has_room: Callable[[Unit], bool]) -> Unit | None:
        """Where one more replica goes; None where there is no place."""
        return max((unit for unit in self.open() if has_room(unit)), key=lambda unit: unit.value, default=None)

    def open(self) -> list[Unit]:
        """Units that may grow if there is room. One that lost a replica in this decision does not get it back."""
        return [
            unit
            for unit in self.units
            if unit.allowed and not unit.blocked and unit.before <= unit.target < unit.ceiling
        ]

    def to_shrink(self) -> Unit | None:
        """Which unit loses a replica first; None where all are at their floors."""
        spare = [unit for unit in self.units if unit.target > unit.floor]
        # Of equals the one furthest from home: units are listed home first.
        return min(reversed(spare), key=lambda unit: unit.value, default=None)

    def fits_less(self) -> Unit | None:
        """The unit that can lose a replica while the load fits what stays, else None."""
        if self.need is None or self.total <= self.minimum or self.capacity < self.need.down * (1 - ROUNDING):
            return None
        unit = self.to_shrink()
        return unit if unit is not None and self.fits_without(unit) else None

    def fits_without(self, unit: Unit) -> bool:
        """Whether `unit` can lose a replica and the load still fits, even by the tightened targets."""
        if self.need is None or unit.target <= unit.floor or self.total <= self.minimum:
            return False
        needed = self.need.down * (1 - ROUNDING)
        if self.capacity - (unit.speed if unit.allowed else 0.0) < needed:
            return False
        # What starts is no capacity yet: a ready replica goes only where the ready ones that stay suffice.
        return unit.target > unit.ready or self.ready_capacity - unit.speed >= needed


def scalables(signals: Signals, spec: PolicySpec, fleet: Fleet) -> list[Scalable]:
    """Working copies of everything that has counts, in the order of the fleet. Unusable loads become None."""
    by_name: dict[str, Scalable] = {}
    for facts in fleet.units.values():
        counts = signals.counts.get(facts.name)
        if counts is None:
            continue
        name = facts.name if facts.group is None else facts.group
        found = by_name.get(name)
        if found is None:
            found = by_name[name] = _scalable(name, facts.group, signals, spec)
        unit = _unit(facts, counts, found.scaling, spec, fleet.max_replicas_hard)
        if unit.floor:
            found.units.insert(0, unit)
        else:
            found.units.append(unit)
    for each in by_name.values():
        _complete(each)
    return list(by_name.values())


def units_of(listed: list[Scalable]) -> Iterator[Unit]:
    """All units of all of them."""
    return (unit for each in listed for unit in each.units)


def _scalable(name: str, group: str | None, signals: Signals, spec: PolicySpec) -> Scalable:
    if group is None:
        return Scalable(name, None, [], spec.router)
    load = signals.groups.get(group)
    return Scalable(name, group, [], spec.scaling(group), load if load is not None and is_usable(load) else None)


def _unit(
    facts: UnitFacts, counts: UnitCounts, scaling: ScalingSpec | RouterScaling, spec: PolicySpec, hard: int
) -> Unit:
    ready, before, leaving = _count(counts.ready), _count(counts.target), _count(counts.leaving)
    home = facts.group is None or facts.name == deployment_name(facts.group)
    pools = scaling.pools if isinstance(scaling, ScalingSpec) else None
    return Unit(
        facts,
        ready,
        before,
        leaving,
        target=before,
        floor=1 if home else 0,
        ceiling=max(1, hard),
        cost=spec.pools.get(facts.pool, NO_POLICY).cost,
        allowed=pools is None or facts.pool in pools,
    )


def _complete(each: Scalable) -> None:
    """What depends on all units."""
    if each.group is not None:
        _set_speeds(each)
    floor, ready_capacity = 0, 0.0
    for unit in each.units:
        floor += unit.floor
        ready_capacity += unit.ready * unit.speed
    each.minimum, each.maximum = max(each.scaling.min_replicas, floor), max(each.scaling.max_replicas, floor)
    each.ready_capacity = ready_capacity


def _set_speeds(each: Scalable) -> None:
    measured = each.load.speed_rows_per_s if each.load is not None else {}
    known = {}
    for unit in each.units:
        speed = measured.get(unit.facts.pool) or unit.facts.speed_rows_per_s or 0.0
        if SPEED_RANGE[0] <= speed <= SPEED_RANGE[1]:
            known[unit.facts.name] = speed
    if not known:
        return
    each.speed_known = True
    mean = sum(known.values()) / len(known)
    for unit in each.units:
        unit.speed = known.get(unit.facts.name, mean)


def _count(value: int) -> int:
    return value if 0 <= value <= MOST_REPLICAS else int(min(MOST_REPLICAS, max(0, value)))

"""A plan: which GPUs the routers get, which experts each other GPU holds. Pure but for the planner, which is as well.

A device holds one router or one replica of one group. Every kind that can hold a router is tried; of the rest every
number of devices of each kind, so that another device never makes the step longer. Beyond `MOST_CHOICES`: those
with most room first, and the fastest first, some numbers of them. The shortest expected step counts, and of equals the
plan with fewer devices; the order of the kinds never does. With recorded loads the planner of `cluster.placement` deals
instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import prod

from cluster.errors import PlacementError
from cluster.placement import Experts
from cluster.placement.devices import DeviceKind
from cluster.placement.planner import plan as plan_by_load
from cluster.sizing.gpus import GpuPool
from cluster.sizing.memory import RESERVE, RouterMemory, Work, replica_step_bytes, router_memory
from cluster.sizing.misfit import experts_misfit, router_misfit
from cluster.sizing.shape import Shape
from cluster.sizing.spread import deal, shares
from cluster.sizing.step import Reading, StepTime, step_time

USUAL_SEQUENCES = 8
"""The step whose time decides between plans."""
MOST_CHOICES = 256
"""Up to here every choice of devices is looked at."""
MOST_LOOKS = 32
"""Beyond, in each order, so many numbers of devices from the fewest that hold all, and as many of all the others."""


@dataclass(frozen=True)
class Conditions:
    """What a plan is made for. link: bytes a second of the router's network, each way. reserve: see memory.py."""

    work: Work = field(default_factory=Work)
    context_tokens: int = 1024
    link: float = 25e9 / 8
    reserve: float = RESERVE

    def usable(self, pool: GpuPool) -> float:
        """Bytes of one of its GPUs that may be planned with."""
        return pool.memory_bytes * (1 - self.reserve)


@dataclass(frozen=True)
class Group:
    """One expert group. replicas: pool -> how many. weights_bytes, step_bytes: of one replica."""

    experts: Experts
    replicas: Mapping[str, int]
    weights_bytes: int
    step_bytes: int


@dataclass(frozen=True)
class SizingPlan:
    """router_pool: where the routers run, one to a GPU. unused: pool -> GPUs left over."""

    router_pool: str
    router: RouterMemory
    groups: tuple[Group, ...]
    unused: Mapping[str, int]


def fit(
    shape: Shape,
    pools: Sequence[GpuPool],
    conditions: Conditions,
    loads: Mapping[int, Sequence[float]] | None = None,
) -> SizingPlan:
    """The plan with the shortest expected step of those looked at.

    Raises:
        PlacementError: the router or the experts do not fit; how much is missing, and what would do.
    """
    router = router_memory(shape, conditions.work)
    pools = sorted(pools, key=lambda pool: (-pool.memory_bytes, -(pool.bandwidth or 0), pool.name))
    homes = [
        pool
        for pool in pools
        if pool.count >= conditions.work.routers and conditions.usable(pool) >= router.total_bytes
    ]
    if not homes:
        raise PlacementError(router_misfit(shape, pools, conditions.work, conditions.reserve))
    plans = [plan for home in homes for plan in _plans(shape, pools, home, router, conditions, loads)]
    if not plans:
        choices = [_left(pools, home, conditions.work.routers) for home in homes]
        whole = 1 if loads is None else len(shape.experts)
        left = max(choices, key=lambda choice: _room(shape, choice, conditions, whole))
        places = [_places(shape, pool, conditions) // whole * whole for pool in left]
        raise PlacementError(experts_misfit(shape, left, places, conditions.reserve, whole))
    best: SizingPlan = min(plans, key=lambda plan: _worth(shape, pools, plan, conditions))
    return best


def times(
    shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions, sequences: Sequence[int]
) -> list[StepTime]:
    """The expected step for each number of sequences."""
    return [
        step_time(
            shape,
            [group.experts for group in plan.groups],
            _reading(pools, plan),
            sequences=count,
            context_tokens=conditions.context_tokens,
            link=conditions.link,
        )
        for count in sequences
    ]


def _plans(
    shape: Shape,
    pools: Sequence[GpuPool],
    home: GpuPool,
    router: RouterMemory,
    conditions: Conditions,
    loads: Mapping[int, Sequence[float]] | None,
) -> Iterator[SizingPlan]:
    left = _left(pools, home, conditions.work.routers)
    found = _spread(shape, left, conditions) if loads is None else _by_load(shape, left, conditions, loads)
    step_bytes = replica_step_bytes(shape, conditions.work)
    for dealt in found:
        groups = tuple(
            Group(experts, replicas, _weights_bytes(shape, experts), step_bytes) for experts, replicas in dealt
        )
        used = {pool.name: sum(group.replicas.get(pool.name, 0) for group in groups) for pool in left}
        unused = {pool.name: pool.count - used[pool.name] for pool in left if pool.count > used[pool.name]}
        yield SizingPlan(home.name, router, groups, unused)


def _spread(
    shape: Shape, left: Sequence[GpuPool], conditions: Conditions
) -> Iterator[list[tuple[Experts, Mapping[str, int]]]]:
    """One group to a device, for every choice of devices that holds all experts."""
    places = {pool.name: _places(shape, pool, conditions) for pool in left}
    kinds = [pool for pool in left if pool.count and places[pool.name]]
    for devices in _choices(kinds, places, shape.places):
        chosen = [pool for pool in kinds for _ in range(devices[pool.name])]
        room = [places[pool.name] for pool in chosen]
        if sum(room) < shape.places:
            continue
        alike = any(pool.bandwidth is None for pool in chosen)
        parts = shares(shape.places, room, [1.0 if alike else pool.bandwidth or 1.0 for pool in chosen])
        dealt = zip(chosen, deal(shape.experts, parts), strict=True)
        yield [(experts, {pool.name: 1}) for pool, experts in dealt if experts]


def _choices(kinds: Sequence[GpuPool], places: Mapping[str, int], needed: int) -> Iterator[Mapping[str, int]]:
    """How many devices of each kind: all there are, of large fleets some of those that fill up with the best first."""
    if prod(pool.count + 1 for pool in kinds) <= MOST_CHOICES:
        for counts in product(*(range(pool.count + 1) for pool in kinds)):
            yield {pool.name: count for pool, count in zip(kinds, counts, strict=True)}
        return
    roomiest = sorted(kinds, key=lambda pool: (-places[pool.name], -(pool.bandwidth or 0), pool.name))
    fastest = sorted(kinds, key=lambda pool: (-(pool.bandwidth or 0), -places[pool.name], pool.name))
    most = sum(pool.count for pool in kinds)
    for order in (roomiest, fastest):
        devices = [pool.name for pool in order for _ in range(pool.count)]
        held = accumulate(places[name] for name in devices)
        fewest = next((count for count, room in enumerate(held, start=1) if room >= needed), most)
        near, far = range(fewest, min(most, fewest + MOST_LOOKS)), range(fewest, most, max(1, most // MOST_LOOKS))
        for count in sorted({*near, *far, most}):
            yield Counter(devices[:count])


def _by_load(
    shape: Shape, left: Sequence[GpuPool], conditions: Conditions, loads: Mapping[int, Sequence[float]]
) -> Iterator[list[tuple[Experts, Mapping[str, int]]]]:
    """What the planner makes of recorded loads; it knows experts that a device holds in every layer alike."""
    if {layer: len(row) for layer, row in loads.items()} != shape.experts:
        raise PlacementError("--loads: these are of another model: layers and experts must be those of config.json.")
    slots = {pool.name: _places(shape, pool, conditions) // len(shape.experts) for pool in left}
    alike = any(pool.bandwidth is None for pool in left)
    kinds = [
        DeviceKind(pool.name, pool.count, slots[pool.name], 1.0 if alike else pool.bandwidth or 1.0)
        for pool in left
        if pool.count and slots[pool.name]
    ]
    if sum(kind.count * kind.slots for kind in kinds) >= max(shape.experts.values()):
        found = plan_by_load(loads, kinds)
        yield list(zip(found.placement.groups, found.replicas, strict=True))


def _left(pools: Sequence[GpuPool], home: GpuPool, routers: int) -> list[GpuPool]:
    """The GPUs that are no router's."""
    return [replace(pool, count=pool.count - routers) if pool is home else pool for pool in pools]


def _places(shape: Shape, pool: GpuPool, conditions: Conditions) -> int:
    """Experts of one layer that one of its GPUs holds."""
    room = conditions.usable(pool) - replica_step_bytes(shape, conditions.work)
    return max(0, int(room // shape.expert_bytes))


def _room(shape: Shape, pools: Sequence[GpuPool], conditions: Conditions, whole: int) -> int:
    """In places, which count by so many at once."""
    return sum(pool.count * (_places(shape, pool, conditions) // whole * whole) for pool in pools)


def _weights_bytes(shape: Shape, experts: Experts) -> int:
    return sum(len(ids) * shape.expert_numbers[layer] for layer, ids in experts.items()) * shape.item_bytes


def _reading(pools: Sequence[GpuPool], plan: SizingPlan) -> Reading:
    """Rows of a group with several replicas are split by expert: together they read as fast as the sum of them."""
    bandwidth = {pool.name: pool.bandwidth for pool in pools}
    groups = []
    for group in plan.groups:
        each = [(bandwidth[pool], count) for pool, count in group.replicas.items()]
        known = [one * count for one, count in each if one is not None]
        groups.append(sum(known) if len(known) == len(each) else None)
    return Reading(bandwidth[plan.router_pool], tuple(groups))


def _worth(
    shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions
) -> tuple[bool, float, int, float]:
    """Less is better: a step that is known, then its time, then the GPUs used, then the memory of the router's."""
    sequences = min(USUAL_SEQUENCES, conditions.work.sequences)
    (usual,) = times(shape, pools, plan, conditions, [sequences])
    used = sum(sum(group.replicas.values()) for group in plan.groups)
    home = next(pool for pool in pools if pool.name == plan.router_pool)
    return (usual.total_s is None, usual.total_s or 0.0, used, home.memory_bytes)

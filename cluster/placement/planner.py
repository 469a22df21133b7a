"""The planner: from loads and a budget of unequal devices to groups, their experts, and the replicas of each.

What is minimised is the sum over layers of the slowest group's time: its load in that layer over the summed speed of
the devices that hold it, because a step passes the layers one after the other and waits in each for the last group.

    loads, devices ──> allotment (devices to groups) ──> experts to groups, layer by layer ──> Plan

Small problems (8 experts a layer, 4 devices) are solved exactly, larger ones by bounds, longest processing time first
and swaps: `Plan.ratio` says how far from the best they can be at most.

Compared with EPLB, the balancer of DeepSeek-V3 (github.com/deepseek-ai/EPLB, `rebalance_experts`; DeepSeek-AI 2024,
arXiv 2412.19437, section 3.4), which replicates the hottest experts and packs them on equal GPUs, greedily:

| | EPLB | here |
| --- | --- | --- |
| devices | equal, equally many experts on each | kinds of different speed and memory |
| two copies of an expert on one device | possible | impossible: a device holds one replica of one group |
| rows of an expert with replicas | split equally | in proportion to the speed of the devices |
| divisibility | replicas by GPUs, groups by nodes | none |
| migration | not considered: every run may move everything | a budget of moves against today's placement |
| optimality | no statement | exact when small, a ratio to a lower bound when large |
| what is replicated | one expert of one layer | a group, in all layers: what one Serve deployment scales |

The last row is the price: EPLB can copy the hottest expert of each layer by itself, a group has only as many replicas
in one layer as in all others. So the planner aligns layers: what is hot sits in the first groups in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import PlacementError
from cluster.placement.allotments import check_fit
from cluster.placement.devices import DeviceKind
from cluster.placement.exact import fewest_moves, is_small, solve
from cluster.placement.free import aligned, free_plan
from cluster.placement.moves import few_moves, relabelled
from cluster.placement.partition import Experts, Placement
from cluster.placement.problem import Ints, Problem, Today, make_problem, slowest_of


@dataclass(frozen=True)
class Plan:
    """placement: the groups. replicas: of each group, kind of device -> how many. unused: kind -> devices left over.

    slowest: sum over layers of the slowest group's time, in loads over speeds. bound: no plan is below it.
    The bound knows nothing of moves that were not allowed. moves: (layer, expert) pairs that change their group, None
    without a placement of today. exact: nothing is better.
    """

    placement: Placement
    replicas: tuple[Mapping[str, int], ...]
    unused: Mapping[str, int]
    slowest: float
    bound: float
    moves: int | None
    exact: bool

    @property
    def ratio(self) -> float:
        """How far from the best this can be at most: 1.02 is 2 %."""
        return self.slowest / self.bound if self.bound else 1.0


def plan(
    load: Mapping[int, Sequence[float]],
    devices: Sequence[DeviceKind],
    *,
    groups: int | None = None,
    today: Placement | None = None,
    max_moves: int | None = None,
) -> Plan:
    """The groups and replicas whose slowest device is expected to finish soonest.

    load[layer][expert]: rows, or shares of them; layers are added up, so give all in the same unit. groups: exactly so
    many, or as many as are best. today, max_moves: at most so many (layer, expert) end up in another group than today;
    without max_moves any number, and groups keep the indices that move the fewest.

    Raises:
        PlacementError: the experts do not fit on the devices, or `today` is of another model or needs more moves.
    """
    problem = make_problem(load, devices)
    check_fit(problem, groups)
    exact = is_small(problem)
    allotment, owner, bound = _solved(problem, groups) if exact else free_plan(problem, groups)
    if today is None:
        return _plan(problem, allotment, owner, bound)
    before = _today(problem, today, max_moves)
    allotment, owner = relabelled(problem, allotment, owner, before)
    if before.moves(owner).sum() > before.max_moves:
        found = solve(problem, groups, before) if exact else few_moves(problem, groups, before, (allotment, owner))
        if found is None:
            raise PlacementError(_too_few(problem, groups, before))
        allotment, owner = found
    return _plan(problem, allotment, owner, bound, before)


def _solved(problem: Problem, groups: int | None) -> tuple[Ints, Ints, float]:
    found = solve(problem, groups, None)
    # `check_fit` has passed, and with enough slots there always is a plan.
    assert found is not None
    allotment, owner = found
    bound = float(slowest_of(problem, allotment, owner).sum())
    order = np.argsort(-problem.speed_of(allotment), kind="stable")
    allotment, owner = allotment[order], np.argsort(order)[np.maximum(owner, 0)]
    return allotment, aligned(problem, allotment, owner), bound


def _today(problem: Problem, today: Placement, max_moves: int | None) -> Today:
    experts = dict(zip(problem.layers, problem.experts.tolist(), strict=True))
    if dict(today.experts_per_layer) != experts:
        raise PlacementError(
            "today's placement is of another model: its layers and experts must be those of the loads."
        )
    owner = np.full(problem.weights.shape, -1, dtype=np.int64)
    for index, layer in enumerate(problem.layers):
        owner[index, : experts[layer]] = today.owner[layer]
    return Today(owner, int(problem.experts.sum()) if max_moves is None else max_moves)


def _too_few(problem: Problem, groups: int | None, before: Today) -> str:
    message = f"--max-moves: {before.max_moves} moves do not take today's placement to these devices"
    if is_small(problem):
        return f"{message}; allowed: at least {max(fewest_moves(problem, groups, before.owner), before.max_moves + 1)}."
    return f"{message}; allow more, or leave it out."


def _plan(problem: Problem, allotment: Ints, owner: Ints, bound: float, before: Today | None = None) -> Plan:
    names = [kind.name for kind in problem.kinds]
    unused = problem.available - allotment.sum(axis=0)
    return Plan(
        placement=_placement(problem, owner, len(allotment)),
        replicas=tuple({n: c for n, c in zip(names, row, strict=True) if c} for row in allotment.tolist()),
        unused={n: c for n, c in zip(names, unused.tolist(), strict=True) if c},
        slowest=float(slowest_of(problem, allotment, owner).sum()),
        bound=bound,
        moves=None if before is None else int(before.moves(owner).sum()),
        exact=is_small(problem),
    )


def _placement(problem: Problem, owner: Ints, groups: int) -> Placement:
    chosen: tuple[Experts, ...] = tuple({} for _ in range(groups))
    # Sorted by group, then by id; what a layer does not have comes last.
    owner = np.where(problem.real, owner, groups)
    ids = np.argsort(owner, axis=1, kind="stable").tolist()
    at = owner + np.arange(len(owner))[:, None] * (groups + 1)
    counts = np.bincount(at.ravel(), minlength=len(owner) * (groups + 1)).reshape(len(owner), -1)
    ends = np.cumsum(counts[:, :groups], axis=1).tolist()
    for layer, row, stops in zip(problem.layers, ids, ends, strict=True):
        start = 0
        for members, stop in zip(chosen, stops, strict=True):
            if stop > start:
                members[layer] = tuple(row[start:stop])
                start = stop
    return Placement(dict(zip(problem.layers, problem.experts.tolist(), strict=True)), chosen)

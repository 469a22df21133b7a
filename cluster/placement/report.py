"""What the planner found, in words: the groups, how even they are beside simpler placements, and how to use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np

from cluster.config import HOME_POOL, ExpertsSpec
from cluster.errors import PlacementError
from cluster.placement.by_load import balanced, hot_aligned
from cluster.placement.deal import deal
from cluster.placement.devices import DeviceKind
from cluster.placement.partition import Placement, contiguous
from cluster.placement.planner import Plan
from cluster.placement.problem import Floats, Problem, make_problem, slowest_of

Load = Mapping[int, Sequence[float]]


def report(load: Load, devices: Sequence[DeviceKind], plan: Plan) -> list[str]:
    """Lines for a terminal."""
    problem = make_problem(load, devices)
    return [*_summary(problem, plan), "", *_groups(problem, plan), "", *_evenness(problem, load, plan)]


def how_to_use(plan: Plan, file: str) -> list[str]:
    """Lines of configuration that put the plan into force."""
    replicas = {f"experts-{index}": by_kind for index, by_kind in enumerate(plan.replicas)}
    lines = ["experts:", f"  groups: {len(replicas)}", f"  placement: {{strategy: explicit, file: {file}}}"]
    if {kind for by_kind in plan.replicas for kind in by_kind} == {HOME_POOL}:
        several = {group: by_kind[HOME_POOL] for group, by_kind in replicas.items() if by_kind[HOME_POOL] > 1}
        most = max(several.values(), default=1)
        if several:
            lines.append("  replicas: {" + ", ".join(f"{group}: {count}" for group, count in several.items()) + "}")
        if most > ExpertsSpec().max_replicas_hard:
            lines.append(f"  max_replicas_hard: {most}")
        return lines
    lines.append("  replicas: elastic")
    most = max(count for by_kind in plan.replicas for count in by_kind.values())
    if most > ExpertsSpec().max_replicas_hard:
        lines.append(f"  max_replicas_hard: {most}")
    lines += ["with a pool for each other kind of device, and in the policy file:", "groups:"]
    for group, by_kind in replicas.items():
        # An elastic group keeps a replica in its home pool, planned or not; it is counted beside the planned ones.
        with_home = {HOME_POOL: 1, **by_kind}
        pools, count = ", ".join(with_home), sum(with_home.values())
        lines.append(f"  - {{match: {group}, pools: [{pools}], min_replicas: {count}, max_replicas: {count}}}")
    if any(HOME_POOL not in by_kind for by_kind in plan.replicas):
        lines.append(
            f"# Groups without a device in pool {HOME_POOL} keep one replica there all the same, which the plan does "
            "not count: name the kind they are at home in so. To have the plan exactly, set fixed `replicas` by group "
            "in `experts` (0 for these) and in each pool, as python -m cluster.sizing --config does."
        )
    return lines


def replicas_text(by_kind: Mapping[str, int]) -> str:
    """`2 l4, 1 h100`."""
    return ", ".join(f"{count} {kind}" for kind, count in by_kind.items())


def _summary(problem: Problem, plan: Plan) -> list[str]:
    fewest, most = int(problem.experts.min()), problem.most_experts
    experts = f"{most}" if fewest == most else f"{fewest} to {most}"
    used = sum(sum(by_kind.values()) for by_kind in plan.replicas)
    total = int(problem.available.sum())
    near = "nothing is better" if plan.exact else f"at most {100 * (plan.ratio - 1):.1f} % from the best there can be"
    if plan.moves is not None:
        near = "nothing is better with so few moves" if plan.exact else f"{near} with any number of moves"
        near = f"{plan.moves} of {int(problem.experts.sum())} experts change their group, and {near}"
    unused = f" (unused: {replicas_text(plan.unused)})" if plan.unused else ""
    return [
        f"{len(problem.layers)} layers of {experts} experts: {len(plan.replicas)} groups on {used} of {total} devices"
        f"{unused}; {near}."
    ]


def _groups(problem: Problem, plan: Plan) -> list[str]:
    """One line for each run of groups with the same replicas."""
    total = problem.weights.sum() or 1.0
    lines = [f"{'group':24}{'replicas':20}{'experts a layer':18}share of rows"]
    rows = dict(zip(problem.layers, problem.weights, strict=True))
    for by_kind, run in groupby(range(len(plan.replicas)), key=lambda index: plan.replicas[index]):
        indices = list(run)
        groups = [plan.placement.groups[index] for index in indices]
        counts = [len(group.get(layer, ())) for group in groups for layer in problem.layers]
        shares = [sum(rows[layer][list(ids)].sum() for layer, ids in group.items()) / total for group in groups]
        name = f"experts-{indices[0]}" + (f" to experts-{indices[-1]}" if len(indices) > 1 else "")
        lines.append(
            f"{name:24}{replicas_text(by_kind):20}{_span(min(counts), max(counts)):18}"
            + _span(f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}")
            + " %"
        )
    return lines


def _span(least: object, most: object) -> str:
    return f"{least}" if least == most else f"{least} to {most}"


def _evenness(problem: Problem, load: Load, plan: Plan) -> list[str]:
    """Imbalance of the plan beside placements of as many groups, to which the devices are dealt as well as can be."""
    groups = len(plan.replicas)
    counts = dict(zip(problem.layers, problem.experts.tolist(), strict=True))
    others: dict[str, Callable[[], Placement]] = {
        "balanced": lambda: balanced(counts, groups, load),
        "hot_aligned": lambda: hot_aligned(counts, groups, load),
        "contiguous": lambda: contiguous(counts, groups),
    }
    names = [kind.name for kind in problem.kinds]
    planned = np.array([[by_kind.get(name, 0) for name in names] for by_kind in plan.replicas])
    lines = [f"{'imbalance (max/mean)':24}{'mean of layers':20}worst layer"]
    lines.append(_line("this plan", _imbalance(problem, slowest_of(problem, planned, _owner(problem, plan.placement)))))
    for name, make in others.items():
        try:
            owner = _owner(problem, make())
        except PlacementError:
            lines.append(f"{name:24}impossible: fewer experts than groups in some layer")
            continue
        dealt = deal(problem, owner, groups)
        if dealt is None:
            lines.append(f"{name:24}impossible: a group does not fit on a device")
        else:
            lines.append(_line(name, _imbalance(problem, slowest_of(problem, dealt, owner))))
    return [
        *lines,
        "mean: what a layer would take if all devices of the budget shared it in proportion to their speed.",
    ]


def _line(name: str, imbalance: Floats) -> str:
    return f"{name:24}{imbalance.mean():<20.3f}{imbalance.max():.3f}"


def _imbalance(problem: Problem, slowest: Floats) -> Floats:
    """[L] the slowest group's time over the mean; 1 where a layer has no load."""
    mean = problem.weights.sum(axis=1) / (problem.speeds @ problem.available)
    return np.where(mean > 0, slowest / np.where(mean > 0, mean, 1.0), 1.0)


def _owner(problem: Problem, placement: Placement) -> np.typing.NDArray[np.int64]:
    owner = np.full(problem.weights.shape, -1, dtype=np.int64)
    for index, layer in enumerate(problem.layers):
        owner[index, : problem.experts[index]] = placement.owner[layer]
    return owner

"""A plan in words and as JSON. Every figure says whether it is computed, measured or assumed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from cluster.sizing.fit import Conditions, SizingPlan, times
from cluster.sizing.gpus import GpuPool
from cluster.sizing.measured import hop_s
from cluster.sizing.memory import kv_token_bytes, tokens_that_fit
from cluster.sizing.misfit import gigabytes
from cluster.sizing.shape import ITEM_BYTES, Shape
from cluster.sizing.step import COUNT_BYTES, traffic

STEPS = (1, 8, 32)
BILLION = 10**9


def report(shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions) -> list[str]:
    """Lines for a terminal."""
    return [
        *_model(shape),
        "",
        *_router(shape, pools, plan, conditions),
        "",
        *_groups(shape, pools, plan, conditions),
        "",
        *_network(shape, plan),
        "",
        *_steps(shape, pools, plan, conditions),
    ]


def as_json(shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions) -> dict[str, Any]:
    """The same as plain data; sizes in bytes, times in seconds."""
    rows = traffic(shape)
    return {
        "model": {
            **asdict(shape),
            "latent": shape.latent,
            "total_numbers": shape.total_numbers,
            "experts_numbers": shape.all_experts_numbers,
            "expert_bytes": shape.expert_bytes,
            "kv_token_bytes": kv_token_bytes(shape),
        },
        "conditions": asdict(conditions),
        "pools": [asdict(pool) | {"usable_bytes": conditions.usable(pool)} for pool in pools],
        "router": {"pool": plan.router_pool, "total_bytes": plan.router.total_bytes, **asdict(plan.router)},
        "groups": [
            {
                "name": f"experts-{number}",
                "replicas": dict(group.replicas),
                "experts": sum(map(len, group.experts.values())),
                "weights_bytes": group.weights_bytes,
                "step_bytes": group.step_bytes,
            }
            for number, group in enumerate(plan.groups)
        ],
        "unused": dict(plan.unused),
        "network": asdict(rows) | {"token_layer_bytes": rows.token_layer_bytes, "count_bytes": COUNT_BYTES},
        "steps": [
            asdict(each) | {"total_s": each.total_s, "tokens_per_s": each.tokens_per_s}
            for each in times(shape, pools, plan, conditions, _counts(conditions))
        ],
    }


def _model(shape: Shape) -> list[str]:
    experts, layers = sorted(set(shape.experts.values())), len(shape.experts)
    lines = [
        f"{shape.model_type}: {shape.total_numbers / BILLION:.1f} billion weights, "
        f"{shape.all_experts_numbers / BILLION:.1f} of them in {layers} of {shape.layers} layers with "
        f"{' or '.join(map(str, experts))} routed experts, {shape.top_k} a token; contexts up to "
        f"{shape.max_context:,} tokens.",
        "",
        f"{'weights (computed)':26}" + "".join(f"{name:>12}" for name in ITEM_BYTES),
    ]
    parts = {
        "router, all of it": shape.router_numbers,
        "  its shared experts": shape.shared_numbers,
        "all routed experts": shape.all_experts_numbers,
        "an expert of one layer": max(shape.expert_numbers.values()),
    }
    for name, numbers in parts.items():
        lines.append(f"{name:26}" + "".join(f"{_size(numbers * item):>12}" for item in ITEM_BYTES.values()))
    return [*lines, f"Below: {shape.dtype}."]


def _router(shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions) -> list[str]:
    need, work = plan.router, conditions.work
    usable = conditions.usable(next(pool for pool in pools if pool.name == plan.router_pool))
    most = tokens_that_fit(shape, work, usable)
    kind = "latents of MLA" if shape.latent else "keys and values"
    return [
        f"{'a router' if work.routers == 1 else f'{work.routers} routers, each'} on a GPU of {plan.router_pool}: "
        f"{gigabytes(need.total_bytes)} of {gigabytes(usable)} that may be used",
        f"  {gigabytes(need.weights_bytes):>9}  weights (computed); as much of the node's own memory while it loads",
        f"  {gigabytes(need.kv_bytes):>9}  {work.kv_tokens:,} tokens of {kind}, {kv_token_bytes(shape):,} bytes each "
        f"(computed); there is room for {most:,}",
        f"  {gigabytes(need.step_bytes):>9}  a step of {work.batch_tokens} tokens, {work.sequences} sequences "
        "(estimated from above)",
        f"  {conditions.reserve:>8.0%}   of every GPU is kept free for driver, kernels and gaps (assumed)",
    ]


def _groups(shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions) -> list[str]:
    lines = [f"{'group':28}{'replicas':14}{'experts a layer':18}{'weights':20}{'a step':10}of"]
    usable = {pool.name: conditions.usable(pool) for pool in pools}
    for (replicas, experts), run in groupby(range(len(plan.groups)), key=lambda number: _kind(shape, plan, number)):
        numbers = list(run)
        groups = [plan.groups[number] for number in numbers]
        name = f"experts-{numbers[0]}" + (f" to experts-{numbers[-1]}" if len(numbers) > 1 else "")
        weights = _span([gigabytes(each.weights_bytes) for each in groups])
        room = " / ".join(gigabytes(usable[pool]) for pool in groups[0].replicas)
        lines.append(f"{name:28}{replicas:14}{experts:18}{weights:20}{gigabytes(groups[0].step_bytes):10}{room}")
    lines += ["", f"{'node pool':28}{'GPUs':>6}{'routers':>10}{'experts':>10}{'unused':>10}"]
    for pool in pools:
        held = sum(group.replicas.get(pool.name, 0) for group in plan.groups)
        routers = conditions.work.routers if pool.name == plan.router_pool else 0
        lines.append(f"{pool.name:28}{pool.count:>6}{routers:>10}{held:>10}{plan.unused.get(pool.name, 0):>10}")
    lines += [
        f"The bandwidth of {pool.name} is unknown, so that no time tells for or against it; give it as in "
        f"--gpus {pool.name}={pool.memory_bytes / BILLION:g}GB@600GB."
        for pool in pools
        if pool.bandwidth is None
    ]
    if plan.unused:
        lines.append(
            "Unused: no plan that was tried is expected to be faster with them. Where a group fits, they can hold "
            "further replicas."
        )
    return lines


def _kind(shape: Shape, plan: SizingPlan, number: int) -> tuple[str, str]:
    """What one line of the table has in common: replicas, and experts of a layer."""
    group = plan.groups[number]
    counts = [len(group.experts.get(layer, ())) for layer in shape.experts]
    replicas = ", ".join(f"{count} {pool}" for pool, count in group.replicas.items())
    return replicas, _span([str(min(counts)), str(max(counts))])


def _span(texts: Sequence[str]) -> str:
    least, most = min(texts, key=_order), max(texts, key=_order)
    return least if least == most else f"{least.removesuffix(' GB')} to {most}"


def _order(text: str) -> float:
    return float(text.removesuffix(" GB").replace(",", ""))


def _network(shape: Shape, plan: SizingPlan) -> list[str]:
    rows, layers = traffic(shape), len(shape.experts)
    return [
        f"network (computed, transport stream): a token sends {rows.out_bytes:,} bytes and gets {rows.back_bytes:,} "
        f"in a layer with experts,",
        f"  {layers * rows.token_layer_bytes / 1e6:,.2f} MB in all {layers}; beside that {rows.batch_bytes} bytes a "
        f"batch and {COUNT_BYTES} for each expert of its group, {len(plan.groups)} batches a layer and step at most.",
    ]


def _steps(shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions) -> Iterator[str]:
    yield (
        f"decode step of one router, contexts of {conditions.context_tokens:,} tokens, a link of "
        f"{conditions.link * 8 / 1e9:g} Gbit/s (assumed):"
    )
    yield f"{'sequences':12}{'router':>10}{'experts':>10}{'network':>10}{'hops':>10}{'step':>10}{'tokens/s':>10}"
    for each in times(shape, pools, plan, conditions, _counts(conditions)):
        parts = (each.router_s, each.experts_s, each.network_s, each.hops_s, each.total_s)
        rate = "unknown" if each.tokens_per_s is None else f"{each.tokens_per_s:,.0f}"
        yield f"{each.sequences:<12}" + "".join(f"{_ms(part):>10}" for part in parts) + f"{rate:>10}"
    yield "router, experts: computed, what is read from memory at the data sheet's bandwidth, which no GPU reaches."
    yield (
        f"hops: {1e6 * hop_s(len(plan.groups)):.0f} us a layer, from what was measured on two CPU cores with 4 and 8 "
        "groups on one machine (infra/bench/README.md)."
    )
    yield "Not in it, because not measured: kernel launches, copies between GPU and host, round trips between nodes."
    yield "Not in it either: --loads, as all experts count alike, and --routers, as one router has all GPUs to itself."


def _counts(conditions: Conditions) -> list[int]:
    return sorted({*(count for count in STEPS if count < conditions.work.sequences), conditions.work.sequences})


def _size(size: float) -> str:
    return gigabytes(size) if size >= BILLION else f"{size / 1e6:,.1f} MB"


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:,.1f} ms"

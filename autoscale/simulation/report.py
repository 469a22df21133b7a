"""Results as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscale.simulation.domains import imbalance
from autoscale.simulation.run import Result
from autoscale.simulation.scenario import Calibration
from autoscale.simulation.world import World

Floats = NDArray[np.float64]

BLOCKS = " ▁▂▃▄▅▆▇█"
PERCENTILES = (50, 95, 99)
WIDTH = 72


def percentiles(seconds: Floats) -> tuple[float, ...]:
    """50th, 95th, 99th; infinite where that many never ended. NaN entries (no second token) do not count."""
    kept = np.sort(seconds[~np.isnan(seconds)])
    if not len(kept):
        return (float("nan"),) * len(PERCENTILES)
    return tuple(float(kept[min(len(kept) - 1, int(len(kept) * share / 100))]) for share in PERCENTILES)


def sparkline(values: Floats, width: int = WIDTH, top: float | None = None) -> str:
    """Means of `width` equal parts as blocks; the highest block is `top`, by default the largest value."""
    if not len(values):
        return ""
    parts = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    top = top or float(values.max())
    if top <= 0:
        return BLOCKS[0] * len(parts)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(np.ceil(part / top * (len(BLOCKS) - 1))))] for part in parts)


def setting(world: World, calibration: Calibration) -> str:
    """What was assumed, and what was measured, before any result."""
    scenario, trace, model = world.scenario, world.trace, world.scenario.model
    start_s = world.constants["start_s"] + scenario.weights_s
    measured = [(name, item) for name, item in calibration if hasattr(item, "source")]
    overridden = {name for name, value in scenario.override if value is not None}
    lines = [
        f"scenario   {scenario.name}: {scenario.about}",
        f"model      {model.layers} layers, {model.experts} experts, top {model.top_k}, {model.groups} groups; "
        f"{len(world.loads)} domains; imbalance of one domain's rows over groups "
        f"{imbalance(world.shares(model.placement)):.2f} as placed",
        "devices    "
        + "; ".join(
            f"{name}: {pool.rows_per_s:,.0f} rows/s, cost {pool.cost:g}" for name, pool in scenario.pools.items()
        ),
        f"units      a group's replica 1 device, a router {scenario.router.devices}, "
        f"a whole-model replica {model.groups} (no hop inside)",
        f"starts     {start_s:.1f} s ({scenario.weights_s:g} s of it weights); failures: "
        + (f"one device in {scenario.mtbf_hours:g} h" if scenario.mtbf_hours else "none"),
        f"SLO        first token in {scenario.slo.ttft_ms:g} ms and {scenario.slo.tpot_ms:g} ms per token, per request",
        f"trace      {len(trace):,} requests in {trace.duration_s / 3600:.2f} h, {trace.prompt_tokens.mean():,.0f} "
        f"prompt and {trace.generated_tokens.mean():,.0f} generated tokens each on average; seed {world.seed}",
        f"measured   {calibration.name}",
    ]
    for name, item in measured:
        used = f"{world.constants[name]:g}"
        note = f"assumed by the scenario in place of {item.value:g}" if name in overridden else item.source
        lines.append(f"           {name} = {used}: {note}")
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """One line per policy, then its parameters and its devices over time."""
    head = (
        f"{'policy':34}{'SLO kept':>9}{'GPU-h':>8}{'cost':>8}{'queue p50/p95/p99 s':>28}{'first token s':>28}"
        f"{'per token ms':>20}{'changes':>9}"
    )
    lines = [head, "-" * len(head)]
    for result in results:
        queue, ttft, tpot = (percentiles(s) for s in (result.queue_s, result.ttft_s, result.tpot_s))
        lines.append(
            f"{result.name:34}{result.kept:>9.2%}{result.device_hours:>8.1f}{result.cost:>8.1f}"
            f"{_slashed(queue, 2):>28}{_slashed(ttft, 2):>28}{_slashed([1e3 * s for s in tpot], 0):>20}"
            f"{result.changes:>9}"
        )
    top = max(float(result.devices.max()) for result in results)
    lines.append("")
    for result in results:
        parameters = ", ".join(f"{key} {value}" for key, value in result.parameters.items())
        lines.append(f"{result.name}: {parameters}")
        lines.append(
            f"  {sparkline(result.devices, top=top)} {result.devices.min():.0f} to {result.devices.max():.0f} devices"
        )
        if result.done < result.requests or result.deaths:
            lines.append(
                f"  {result.requests - result.done} requests not done at the end, {result.deaths} replicas died"
            )
    return "\n".join(lines)


def counts_over_time(result: Result, most: int = 12) -> str:
    """Replicas of each unit over time, those that moved most first."""
    units = sorted(result.counts, key=lambda name: -float(np.ptp(result.counts[name])))[:most]
    top = max((float(result.counts[name].max()) for name in units), default=1.0)
    lines = [
        f"  {name:16}{sparkline(result.counts[name], top=top)} {result.counts[name].min():.0f} to "
        f"{result.counts[name].max():.0f}"
        for name in units
    ]
    left = len(result.counts) - len(units)
    return "\n".join([*lines, *([f"  ... and {left} units more"] if left else [])])


def verdict(ours: Result, whole: Result) -> str:
    """The one sentence the comparison is for."""
    saved = 1 - ours.device_hours / whole.device_hours
    saying = "fewer" if saved >= 0 else "MORE"
    honest = "" if whole.kept >= ours.kept else " (no whole-model setting of the grid kept as many)"
    return (
        f"{ours.name}: {abs(saved):.0%} {saying} GPU-hours than whole-model scaling "
        f"({ours.device_hours:.1f} against {whole.device_hours:.1f}), "
        f"SLO kept {ours.kept:.2%} against {whole.kept:.2%}{honest}."
    )


def as_json(result: Result) -> dict[str, Any]:
    """One policy, ready for `json.dumps`; numbers that are not finite become null."""
    over = {
        f"{name}_s": {
            f"p{share}": _finite(value) for share, value in zip(PERCENTILES, percentiles(seconds), strict=True)
        }
        for name, seconds in (("queue", result.queue_s), ("ttft", result.ttft_s), ("tpot", result.tpot_s))
    }
    return {
        "policy": result.name,
        "parameters": dict(result.parameters),
        "slo_kept": result.kept,
        "gpu_hours": result.device_hours,
        "cost": result.cost,
        "changes": result.changes,
        "deaths": result.deaths,
        "requests": result.requests,
        "done": result.done,
        **over,
        "devices": {"at_s": result.at_s.tolist(), "held": result.devices.tolist()},
        "wall_s": round(result.wall_s, 3),
    }


def summary(constants: Mapping[str, float], results: Sequence[Result], verdict_text: str | None) -> dict[str, Any]:
    """The whole comparison."""
    return {"constants": dict(constants), "verdict": verdict_text, "policies": [as_json(result) for result in results]}


def _slashed(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" if np.isfinite(value) else "never" for value in values)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None

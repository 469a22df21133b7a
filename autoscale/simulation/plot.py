"""The run as a picture: load, replicas per policy, queueing. The only file here that knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoscale.simulation.run import Result
from autoscale.simulation.world import World, demand
from cluster.errors import ConfigError

Floats = NDArray[np.float64]

PARTS = 120
# Okabe and Ito's colours: told apart by the colour-blind too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#E69F00", "#56B4E9")


def draw(path: Path, world: World, results: Sequence[Result]) -> None:
    """Write a PNG. The first result is ours: its units get a panel of their own.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'expertscale[plot]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    hours = world.trace.duration_s / 3600
    unit, per = ("minutes", 60.0) if hours <= 3 else ("hours", 3600.0)
    figure, (load, devices, ours, queue) = pyplot.subplots(4, 1, figsize=(11, 12), sharex=True, layout="constrained")
    window_s = max(10.0, world.trace.duration_s / PARTS)
    _, tokens = demand(world, window_s)
    load.fill_between(np.arange(len(tokens)) * window_s / per, tokens, step="post", color="#BBBBBB")
    load.set(ylabel="tokens/s offered", title=f"{world.scenario.name}: load")
    for result, colour in zip(results, COLOURS, strict=False):
        label = f"{result.name}: {result.device_hours:.1f} GPU-h, SLO kept {result.kept:.1%}"
        devices.step(result.at_s / per, result.devices, where="post", color=colour, label=label, linewidth=1.3)
        at, late = _late(world, result, window_s)
        queue.plot(at / per, late, color=colour, label=result.name, linewidth=1.3)
    devices.set(ylabel="devices held", title="devices held, starting and leaving ones included", ylim=(0, None))
    devices.legend(fontsize=8, loc="upper right")
    moved = sorted(results[0].counts, key=lambda name: -float(np.ptp(results[0].counts[name])))[:10]
    for index, name in enumerate(sorted(moved)):
        ours.step(
            results[0].at_s / per, results[0].counts[name], where="post", label=name, color=f"C{index}", linewidth=1.3
        )
    ours.set(ylabel="replicas", title=f"{results[0].name}: replicas per unit", ylim=(0, None))
    ours.legend(fontsize=8, ncols=2, loc="upper right")
    queue.set(
        ylabel="queueing p95, s", xlabel=unit, title="queueing, p95 of the requests of each moment", yscale="symlog"
    )
    queue.set_ylim(0, None)
    queue.legend(fontsize=8, loc="upper right")
    for axis in (load, devices, ours, queue):
        axis.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error.strerror}.") from None
    finally:
        pyplot.close(figure)


def _late(world: World, result: Result, window_s: float) -> tuple[Floats, Floats]:
    """(middle of each window, 95th percentile of the queueing of requests that came in it); NaN where none came."""
    arrival = world.trace.arrival_s
    edges = np.arange(0, world.trace.duration_s + window_s, window_s)
    cut = np.searchsorted(arrival, edges)
    # What never started is drawn as late as the run was long.
    queue_s = np.minimum(result.queue_s, world.trace.duration_s)
    late = [float(np.percentile(queue_s[first:last], 95)) if last > first else np.nan for first, last in pairwise(cut)]
    return edges[:-1] + window_s / 2, np.array(late)

"""Our policies against the baselines on one trace, each baseline at its best. Reads no file and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoscale.simulation import search
from autoscale.simulation.run import Result
from autoscale.simulation.world import World
from autoscale.spec import PolicySpec


@dataclass(frozen=True)
class Comparison:
    """ours: the policy that was asked for, then the others given, then the tuned one. tried: runs of the searches.

    baselines: the whole model first. level: share of requests whose SLO they had to keep.
    """

    ours: Sequence[Result]
    baselines: Sequence[Result]
    tried: int
    level: float

    @property
    def whole(self) -> Result:
        """The whole-model baseline."""
        return self.baselines[0]


def replay(world: World, spec: PolicySpec, name: str) -> Result:
    """One policy as it is written."""
    result = search.replay_policy(world, spec, name, {})
    assert result is not None, "a run without a limit is never given up"
    return result


def compare(
    world: World,
    specs: Sequence[tuple[str, PolicySpec]],
    level: float,
    tune: bool,
    progress: Callable[[str], None],
) -> Comparison:
    """specs: (name, policy). Baselines must keep as much as the first of them does, and `level` at least.

    tune: search the first policy's best parameters too, in the same way, for the same level.
    """
    ours = []
    for name, spec in specs:
        progress(name)
        ours.append(replay(world, spec, name))
    wanted = max(level, ours[0].kept)
    name, spec = specs[0]
    searches: list[tuple[str, Callable[[], search.Best]]] = [
        ("whole model", lambda: search.whole_model(world, wanted)),
        ("Serve's formula per group", lambda: search.serve_per_group(world, wanted)),
        ("static peak", lambda: search.static(world, wanted, peak=True)),
        ("static mean", lambda: search.static(world, wanted, peak=False)),
    ]
    if tune:
        searches.append((f"{name}, tuned", lambda: search.ours(world, wanted, spec, f"{name}, tuned")))
    found = []
    for what, run in searches:
        progress(f"best parameters of {what}")
        found.append(run())
    ours += [best.result for best in found[4:]]
    return Comparison(ours, [best.result for best in found[:4]], sum(best.runs for best in found), wanted)

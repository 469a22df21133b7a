"""Replays a request trace against a policy file, without a cluster:

    python -m autoscale.simulate --policy autoscale/policies/default.yaml --trace TRACE [--compare] [--plot FILE.png]

What is simulated and how: `SIMULATOR.md`. Exits with 1 and one sentence per error where a file or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from autoscale.policy_file import read
from autoscale.simulation import report
from autoscale.simulation.compare import Comparison, compare, replay
from autoscale.simulation.plot import draw
from autoscale.simulation.run import Result
from autoscale.simulation.scenario import CALIBRATION, Calibration, read_calibration, read_scenario
from autoscale.simulation.world import World, build
from autoscale.spec import PolicySpec
from autoscale.traces import load, stretch
from cluster.errors import ConfigError
from cluster.sentences import Fault


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 with the errors on stderr."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    _check(options)
    specs = [(path.stem, _policy(path)) for path in [options.policy, *options.also]]
    scenario, calibration = read_scenario(options.scenario), read_calibration(options.calibration)
    if options.control_s is not None:
        scenario = scenario.model_copy(update={"control_s": options.control_s})
    trace = stretch(load(options.trace), options.repeat_to, options.rate_scale, options.swing, options.seed)
    world = build(scenario, calibration, trace, options.seed)
    results: list[Result]
    found: Comparison | None = None
    if options.compare:
        found = compare(world, specs, options.at_least / 100, options.tune, _progress)
        results = [*found.ours, *found.baselines]
    else:
        results = [replay(world, spec, name) for name, spec in specs]
    verdict = report.verdict(found.ours[0], found.whole) if found else None
    if options.plot:
        draw(options.plot, world, results)
    if options.json:
        print(json.dumps(report.summary(world.constants, results, verdict)))
        return 0
    _print(world, calibration, results, found)
    if options.decisions:
        print("\n".join(["", *results[0].reasons]))
    return 0


def _policy(path: Path) -> PolicySpec:
    try:
        spec = read(path)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    for resource, source in spec.budget.asks.items():
        allowed = "a simulation has no cluster to ask; write a number, or pool -> number"
        raise ConfigError(f"{path}: {Fault(f'budget.{resource}', source, allowed).sentence()}")
    return spec


def _print(world: World, calibration: Calibration, results: Sequence[Result], found: Comparison | None) -> None:
    print(report.setting(world, calibration), report.table(results), "", report.counts_over_time(results[0]), sep="\n")
    print(f"  one run of {results[0].name} took {results[0].wall_s:.1f} s")
    if found:
        print(f"\nthe best of {found.tried} runs that keep the SLO of {found.level:.2%} of the requests")
        print("\n".join(report.verdict(ours, found.whole) for ours in found.ours))


def _progress(what: str) -> None:
    print(f"... {what}", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    """Raises: ConfigError: an option is out of range."""
    for key, low, high in (
        ("repeat_to", 0.01, 168),
        ("rate_scale", 1e-4, 1e4),
        ("swing", 0, 1),
        ("at_least", 0, 100),
        ("control_s", 0.05, 600),
    ):
        value = getattr(options, key)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{key.replace('_', '-')} {value:g} is not allowed; allowed: {low:g} to {high:g}.")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed} is not allowed; allowed: 0 or more.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m autoscale.simulate", description="Replay a trace, no cluster.")
    parser.add_argument("--policy", type=Path, required=True, help="a policy file")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="more policy files to show beside it")
    parser.add_argument("--trace", type=Path, required=True, help="Azure CSV, BurstGPT CSV or Mooncake JSONL, or .gz")
    parser.add_argument("--scenario", type=Path, default=Path("emulated"), help="a file, or emulated, large, ...")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="measured constants")
    parser.add_argument("--compare", action="store_true", help="against four baselines, each at its best")
    parser.add_argument("--tune", action="store_true", help="with --compare: search the policy's best parameters too")
    parser.add_argument("--at-least", type=float, default=0.0, help="SLO attainment baselines must reach too, in %%")
    parser.add_argument("--repeat-to", type=float, metavar="HOURS", help="repeat the trace, a day's shape over it")
    parser.add_argument("--swing", type=float, default=0.6, help="of that shape: 0 is flat, 1 silent at 2:00")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="requests for each one of the trace")
    parser.add_argument("--control-s", type=float, help="between two decisions; by default the scenario's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--decisions", action="store_true", help="print every change with its reason")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())

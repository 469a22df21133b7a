"""Plan groups and replicas from recorded loads.

    python -m cluster.placement plan --loads F --budget 32 --slots 9 --out placement.json

prints the groups, their replicas and how evenly they share the load, and writes the file that `experts.placement`
takes (strategy explicit). An error is one sentence, and the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cluster.errors import PlacementError
from cluster.placement.devices import Sizes, parse_bytes, parse_devices
from cluster.placement.files import placement_text, read_groups, read_load
from cluster.placement.partition import Placement, explicit
from cluster.placement.planner import plan
from cluster.placement.report import how_to_use, replicas_text, report

EXAMPLES = """
A budget is [name:]count[:slots[:speed]], several separated by commas. The name is that of a pool, `default` where there
is none; slots are the experts of one layer that a device holds; the speed is in rows a second or any unit all share.

  --budget 32 --slots 9                              32 equal devices
  --budget l4:24:9:1.0,h100:8:18:2.5                 two kinds of different memory and speed
  --budget l4:24:24GB:1.0,h100:8:80GB:2.5 --expert-bytes 44e6
  --budget 32 --slots 9 --from placement.json --max-moves 200     little changes
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error here."""

    def error(self, message: str) -> NoReturn:
        raise PlacementError(f"{message[0].upper()}{message[1:]}; --help says what is allowed.")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 1 after one sentence on what is wrong."""
    try:
        _plan(_parser().parse_args(arguments))
    except PlacementError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cluster.placement", description="Which group holds which expert.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "plan",
        help="groups and replicas for recorded loads and a budget of devices",
        description="Pick the groups, their experts and their replicas that let a step wait least for its slowest "
        "device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = one.add_argument
    add("--loads", type=Path, required=True, metavar="FILE", help="loads by layer and expert, JSON or YAML")
    add("--budget", required=True, help="the devices there are, see below")
    add("--slots", metavar="N", help="experts of one layer a device holds, for kinds that do not say")
    add("--memory", metavar="BYTES", help="the same as the memory of a device; 80e9, 80GB or 80GiB")
    add("--expert-bytes", metavar="BYTES", help="memory of one expert of one layer; needed where memory is given")
    add("--groups", metavar="N", help="exactly so many groups; without it as many as are best")
    add("--from", dest="today", type=Path, metavar="FILE", help="today's placement, from which few experts shall move")
    add("--max-moves", metavar="N", help="experts of a layer that may change their group; without it any number")
    add("--out", type=Path, metavar="FILE", help="write the placement there; .json loads faster than .yaml")
    return parser


def _plan(options: argparse.Namespace) -> None:
    load = read_load(options.loads)
    if options.slots is not None and options.memory is not None:
        raise PlacementError("--slots and --memory both say how many experts fit on a device; give one of them.")
    if options.max_moves is not None and options.today is None:
        raise PlacementError("--max-moves counts moves from today's placement; give that with --from.")
    sizes = Sizes(
        layers=max(1, len(load)),
        slots=_whole("--slots", options.slots, 1),
        memory_bytes=_bytes("--memory", options.memory),
        expert_bytes=_bytes("--expert-bytes", options.expert_bytes),
    )
    devices = parse_devices(options.budget, sizes)
    found = plan(
        load,
        devices,
        groups=_whole("--groups", options.groups, 1),
        today=_today(options.today, {layer: len(row) for layer, row in load.items()}),
        max_moves=_whole("--max-moves", options.max_moves, 0),
    )
    print("\n".join(report(load, devices, found)))
    use = how_to_use(found, str(options.out or "FILE"))
    if options.out:
        by_group = [f"experts-{index}: {replicas_text(by_kind)}" for index, by_kind in enumerate(found.replicas)]
        about = [f"Planned from {options.loads.name} for {options.budget}.", "", *use, "", "Replicas:", *by_group]
        _write(options.out, placement_text(found.placement, about, options.out.suffix == ".json"))
        print(f"\nWritten to {options.out}. In the configuration:")
    else:
        print("\nNothing is written without --out FILE. In the configuration:")
    print("\n".join(use))


def _today(path: Path | None, experts_per_layer: dict[int, int]) -> Placement | None:
    return None if path is None else explicit(experts_per_layer, read_groups(path))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlacementError(f"--out: {path} cannot be written: {error.strerror}.") from None


def _whole(key: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not least <= int(text) <= 10**9:
        raise PlacementError(f"{key}: {text!r} is not allowed; allowed: a whole number of at least {least}.")
    return int(text)


def _bytes(key: str, text: str | None) -> float | None:
    return None if text is None else parse_bytes(key, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

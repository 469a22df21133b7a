"""Size a model for a fleet of GPUs, from its config.json alone.

    python -m cluster.sizing --model config.json --gpus rtx4070=12GB:4,h100=80GB:2

prints memory, a grouping, node pools, bytes on the network and the expected step; `--config FILE` writes a config with
its placement. An error is one sentence, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cluster.config import RouterSpec
from cluster.errors import ConfigError
from cluster.placement import read_load
from cluster.sizing.config_text import config_text, placement_file
from cluster.sizing.fit import Conditions, SizingPlan, fit
from cluster.sizing.gpus import KNOWN, GpuPool, parse_gpus
from cluster.sizing.memory import RESERVE, Work
from cluster.sizing.report import as_json, report
from cluster.sizing.shape import Shape, read_shape

LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?")
"""The names of labels that Ray takes, without a prefix."""

EPILOG = f"""
GPUs are NAME[=MEMORY[@BANDWIDTH]][:COUNT], several separated by commas; the name is that of a pool and of the label.

  --gpus h100:2                          a type that is known
  --gpus rtx4070=12GB:4,h100=80GB:2      two kinds
  --gpus mine=24GB@600GB:3               a kind that is not known, with the bytes a second of its memory

Known: {", ".join(KNOWN)}.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error here."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; --help says what is allowed.")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, or 1 after one sentence on what is wrong."""
    try:
        _size(_parser().parse_args(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough; what is left must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    usual, router = Conditions(), RouterSpec()
    parser = _Parser(
        prog="python -m cluster.sizing",
        description="Memory, groups, node pools, network and step time of a model on a fleet of GPUs, without weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH", help="a config.json, or the folder that holds it")
    add("--gpus", required=True, help="the GPUs there are, see below")
    add("--dtype", default="auto", help="float32, bfloat16, float16, or auto for what config.json says")
    add("--routers", default="1", metavar="N", help="how many routers, each on a GPU of its own (1)")
    add("--batch-tokens", default=str(router.max_batch_tokens), metavar="N", help="router.max_batch_tokens")
    add("--sequences", default=str(router.max_sequences), metavar="N", help="router.max_sequences")
    add("--kv-tokens", default=str(router.kv_tokens), metavar="N", help="router.kv_tokens, a multiple of 16")
    add("--context", default=str(usual.context_tokens), metavar="N", help="tokens of a usual sequence")
    add("--link-gbit", default="25", metavar="X", help="a router's network, Gbit/s in each direction (25)")
    add("--reserve", default=str(RESERVE), metavar="X", help=f"share of a GPU's memory that is kept free ({RESERVE})")
    add("--loads", type=Path, metavar="FILE", help="loads by layer and expert, for the planner; without it all alike")
    add("--json", action="store_true", help="the report as JSON")
    add("--config", type=Path, metavar="FILE", help="write a config there, and its placement beside it")
    add("--label", default="gpu", help="the label by which nodes say which GPU they have (gpu)")
    return parser


def _size(options: argparse.Namespace) -> None:
    conditions = _conditions(options)
    if not LABEL.fullmatch(options.label):
        raise ConfigError(
            f"--label: {options.label!r} is not allowed; allowed: up to 63 letters, digits, '-', '_' and '.', "
            "the first and the last a letter or digit."
        )
    pools = parse_gpus(options.gpus)
    loads = None if options.loads is None else read_load(options.loads)
    shape = read_shape(options.model, options.dtype)
    plan = fit(shape, pools, conditions, loads)
    if options.json:
        print(json.dumps(as_json(shape, pools, plan, conditions)))
    else:
        print("\n".join(report(shape, pools, plan, conditions)))
    if options.config is not None:
        _write_config(options, shape, pools, plan, conditions)


def _conditions(options: argparse.Namespace) -> Conditions:
    work = Work(
        batch_tokens=_whole("--batch-tokens", options.batch_tokens),
        sequences=_whole("--sequences", options.sequences),
        kv_tokens=_whole("--kv-tokens", options.kv_tokens, multiple=16),
        routers=_whole("--routers", options.routers),
    )
    if work.batch_tokens < work.sequences:
        raise ConfigError(
            f"--batch-tokens: {work.batch_tokens} is below --sequences ({work.sequences}); each needs a token a step."
        )
    return Conditions(
        work=work,
        context_tokens=_whole("--context", options.context),
        link=_number("--link-gbit", options.link_gbit, 0, 10_000) * 1e9 / 8,
        reserve=_number("--reserve", options.reserve, 0, 0.9, least_too=True),
    )


def _write_config(
    options: argparse.Namespace, shape: Shape, pools: Sequence[GpuPool], plan: SizingPlan, conditions: Conditions
) -> None:
    config = options.config.absolute()
    placement = config.with_name(f"{config.stem}-placement.json")
    folder = (options.model.parent if options.model.is_file() else options.model).absolute()
    about = (
        f"Sized by python -m cluster.sizing for {', '.join(f'{pool.count} {pool.name}' for pool in pools)}; nodes are "
        f"started with --labels {options.label}=NAME."
    )
    text = config_text(
        plan,
        conditions,
        model=str(folder),
        dtype=shape.dtype,
        placement=str(placement),
        label=options.label,
        about=about,
    )
    try:
        placement.write_text(placement_file(shape, plan, about), encoding="utf-8")
        config.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config: {error.filename} cannot be written: {error.strerror}.") from None
    print(f"Written to {config} and {placement}.", file=sys.stderr)


def _whole(key: str, text: str, multiple: int = 1) -> int:
    if not text.isdecimal() or not multiple <= int(text) <= 10**9 or int(text) % multiple:
        allowed = f"a whole number of at least {multiple}" + (f", a multiple of {multiple}" if multiple > 1 else "")
        raise ConfigError(f"{key}: {text!r} is not allowed; allowed: {allowed}.")
    return int(text)


def _number(key: str, text: str, least: float, most: float, *, least_too: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not least <= number <= most or (number == least and not least_too):
        lower = f"from {least:g}" if least_too else f"above {least:g}"
        raise ConfigError(f"{key}: {text!r} is not allowed; allowed: a number {lower} to {most:g}.")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

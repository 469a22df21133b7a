"""Run the benchmarks: progress while they run, then a table, then one JSON line.

python -m infra.bench [--only SIDE,SIDE] [--smoke]

A side that fails is reported and named in the JSON line; the others run all the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from infra.bench.context import Context
from infra.bench.figures import Figure, json_line, table
from infra.bench.machine import about_machine

SIDES = ("fabric", "transports", "growth", "routers", "invariance", "tracing", "serving", "startup")
"""Modules beside this file, in the order in which they run."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1 where a side failed; 0 whatever the figures are, as a slow machine is no error."""
    parser = argparse.ArgumentParser(prog="infra.bench", description=__doc__)
    parser.add_argument("--only", default=",".join(SIDES), help=f"sides, separated by commas; all: {', '.join(SIDES)}")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: does the harness run?")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SIDES):
        parser.error(f"--only: unknown side {sorted(unknown)[0]!r}; allowed: {', '.join(SIDES)}")
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(prefix="xs-bench-") as scratch,
        Context(Path(scratch), smoke=options.smoke) as context,
    ):
        failed = [name for name in chosen if not _ran(name, context, figures)]
        took_s = time.monotonic() - context.started_at
    if options.smoke:  # targets are for the full sizes
        figures = [replace(figure, target=None) for figure in figures]
    print(table(figures))
    about = {"smoke": options.smoke, "seconds": round(took_s, 1), "failed": failed}
    print(json_line(figures, **about, **about_machine()))
    return 1 if failed else 0


def _ran(name: str, context: Context, figures: list[Figure]) -> bool:
    """Run a side and add its figures as they come. False where it failed: those it had until then stay."""
    context.progress(f"{name} ...")
    try:
        for figure in importlib.import_module(f"infra.bench.{name}").run(context):
            figures.append(figure)
    except Exception:
        context.progress(f"{name} failed:\n{traceback.format_exc()}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

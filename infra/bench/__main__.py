"""Run the benchmarks: progress while they run, then a table, then one JSON line.

python -m infra.bench [--only SIDE,SIDE] [--smoke]
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from infra.bench.context import Context
from infra.bench.figures import Figure, json_line, table

SIDES = ("fabric", "transports", "growth", "routers", "serving", "startup")
"""Modules beside this file, in the order in which they run."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 whatever the figures are, as a slow machine is no error."""
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
        for name in chosen:
            context.progress(f"{name} ...")
            figures += importlib.import_module(f"infra.bench.{name}").run(context)
        took_s = time.monotonic() - context.started_at
    print(table(figures))
    about = {"smoke": options.smoke, "seconds": round(took_s, 1), "python": platform.python_version()}
    print(json_line(figures, **about, torch=torch.__version__, threads=torch.get_num_threads()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

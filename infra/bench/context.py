"""What every side of the benchmark gets: a scratch folder, progress, and things that are started once and shared.

A side is a module with `run(context) -> Iterable[Figure]`. What it starts for itself it stops; what it puts into
`shared` by way of `keep` (a model on disk, a running server) is stopped at the end of all sides.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Kept = TypeVar("Kept")


@dataclass
class Context:
    """scratch: a folder that is removed at the end. smoke: smallest sizes and fewest rounds: does the harness run?

    stack: what is closed at the end. shared: what sides have in common, by name.
    has_served: a side has started the server in this run, so the libraries it loads are in memory.
    """

    scratch: Path
    smoke: bool = False
    has_served: bool = False
    started_at: float = field(default_factory=time.monotonic)
    stack: ExitStack = field(default_factory=ExitStack)
    shared: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shared.clear()
        self.stack.close()

    def keep(self, name: str, make: Callable[[], AbstractContextManager[Kept]]) -> Kept:
        """What `make` yields, entered at the first call with this name and left at the end of all sides."""
        if name not in self.shared:
            self.shared[name] = self.stack.enter_context(make())
        kept: Kept = self.shared[name]
        return kept

    def progress(self, text: str) -> None:
        """One line on the terminal (standard error), with the seconds since the start."""
        print(f"[{time.monotonic() - self.started_at:5.0f} s] {text}", file=sys.stderr, flush=True)

    def rounds(self, full: int) -> int:
        """`full`, or 1 in a smoke run."""
        return 1 if self.smoke else full

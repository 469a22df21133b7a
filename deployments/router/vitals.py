"""Whether the engine's thread gets on, as told from outside it: a thread that hangs cannot say so itself.

    turn begins ──compute_s──> layer's rows leave ──experts_s──> results are back ──compute_s──> ... turn ends, at rest

Each arrow is the longest time until the next sign. A step has no bound of its own that would tell slow from stuck: one
that waits for a lost expert group at every layer is slow. Knows no Serve and no asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

COMPUTE_S = 20.0
"""Between two signs while the thread computes: the attention of one layer takes milliseconds, the first time on a new
device, with kernels to compile, seconds."""

P = ParamSpec("P")
R = TypeVar("R")


class Vitals:
    """The time of the next sign that is due. Written by the engine's thread, read from any.

    experts_s: the longest a layer can legitimately be away, for as long as its rows' failure rule allows.
    clock: seconds, monotonic.
    """

    def __init__(
        self, *, compute_s: float = COMPUTE_S, experts_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._compute_s = compute_s
        self._experts_s = experts_s
        self._clock = clock
        self._due_s: float | None = None

    def work(self) -> None:
        """The thread is at work now."""
        self._due_s = self._clock() + self._compute_s

    def rest(self) -> None:
        """There is nothing to do, for however long."""
        self._due_s = None

    def watched(self, scatter_gather: Callable[P, R]) -> Callable[P, R]:
        """`scatter_gather` with a sign before and after it, for less than a microsecond."""

        @wraps(scatter_gather)
        def scatter(*args: P.args, **kwargs: P.kwargs) -> R:
            self._due_s = self._clock() + self._experts_s
            try:
                return scatter_gather(*args, **kwargs)
            finally:
                self._due_s = self._clock() + self._compute_s

        return scatter

    @property
    def stuck(self) -> bool:
        """Whether a sign is overdue."""
        due_s = self._due_s
        return due_s is not None and self._clock() > due_s

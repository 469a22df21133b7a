"""How long requests waited for their first token, and sequences for each next one, of late. Knows no tokens.

The engine's thread writes, once a step; anybody reads. Most sequences of a step had their last token in the same
earlier step, so gaps are kept by length with a count: a step adds an entry or two, however many sequences run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.router.sequence import Sequence

WINDOW_S = 10.0
MAX_ENTRIES = 4096
"""Of either kind; where steps are so quick that more fall into the window, the oldest of them are forgotten."""


@dataclass(frozen=True)
class Percentiles:
    """95th percentiles in seconds; None where nothing happened in the window."""

    ttft_p95_s: float | None
    tpot_p95_s: float | None


class Latency:
    """Entries are (time, seconds, how many). clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float], window_s: float = WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._lock = threading.Lock()
        self._first: deque[tuple[float, float, int]] = deque(maxlen=MAX_ENTRIES)
        self._next: deque[tuple[float, float, int]] = deque(maxlen=MAX_ENTRIES)

    def step(self, sequences: Iterable[Sequence], now: float) -> None:
        """A step gave each of these another token `now`. The first choice of a request is the first to get one."""
        first: list[float] = []
        following: dict[float, int] = {}
        for sequence in sequences:
            begins = len(sequence.tokens) == len(sequence.request.tokens) + 1
            if not begins:
                following[sequence.awaited_since_s] = following.get(sequence.awaited_since_s, 0) + 1
            elif sequence.leader is None:
                first.append(sequence.awaited_since_s)
            sequence.awaited_since_s = now
        with self._lock:
            for since_s in first:
                self._first.append((now, now - since_s, 1))
            for since_s, count in following.items():
                self._next.append((now, now - since_s, count))

    def percentiles(self) -> Percentiles:
        """Of the last `window_s`, from any thread."""
        since = self._clock() - self._window_s
        with self._lock:
            first, following = list(self._first), list(self._next)
        return Percentiles(*(_p95([entry[1:] for entry in kept if entry[0] >= since]) for kept in (first, following)))


def _p95(values: list[tuple[float, int]]) -> float | None:
    """The least value that at least 95 % of all do not exceed; each value counts as often as is said beside it.

    >>> _p95([(3.0, 1), (1.0, 19)]), _p95([(3.0, 2), (1.0, 19)])
    (1.0, 3.0)
    """
    left = 0.95 * sum(count for _, count in values)
    for value, count in sorted(values):
        left -= count
        if left <= 1e-9:
            return value
    return None

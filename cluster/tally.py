"""How often values have fallen into each bucket of a histogram: counted where a histogram of Ray's would cost too much.

t = Tally((1, 2, 4)); t.add(2); t.add(9); t.counts == [0, 1, 0, 1]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Tally:
    """bounds: ascending; a value belongs to the first bucket whose bound it does not exceed, else to a last one.

    Written by one thread, 0.2 us a value; `counts` may be read from others.
    """

    __slots__ = ("_bounds", "counts")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """One more value."""
        self.counts[bisect_left(self._bounds, value)] += 1

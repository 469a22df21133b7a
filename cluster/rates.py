"""Rates of totals that many senders report about once a second. Pure; knows no clock.

A rate is a difference over the last `WINDOW_S`: over one second some senders would be seen to have said nothing and
some twice as much.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

WINDOW_S = 3.5
SETTLE_S = 6.0
"""Totals that fell are complete again within: idle routers tell a new Directory theirs every five seconds."""


class Rate:
    """The rate of totals that only rise. Totals that fall begin anew: somebody who kept them was restarted.

    For `SETTLE_S` from then on there is no rate: what comes in is what was counted before.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._settled_s = float("-inf")
        self._kept: deque[tuple[float, npt.NDArray[np.int64]]] = deque()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the totals; (0, 0) before the first."""
        return self._kept[-1][1].shape if self._kept else (0, 0)

    def take(self, now_s: float, totals: npt.NDArray[np.int64]) -> None:
        """The totals at `now_s`."""
        if self._kept and (self._kept[-1][1].shape != totals.shape or bool((totals < self._kept[-1][1]).any())):
            self._settled_s = now_s + SETTLE_S
        if now_s < self._settled_s:
            self._kept.clear()
        self._kept.append((now_s, totals))
        while len(self._kept) > 2 and now_s - self._kept[0][0] > self._window_s:
            self._kept.popleft()

    def per_s(self) -> npt.NDArray[np.float64] | None:
        """Over what is kept; None before there are two."""
        if len(self._kept) < 2:
            return None
        (since_s, before), (now_s, totals) = self._kept[0], self._kept[-1]
        return (totals - before) / max(now_s - since_s, 1e-3)

"""Bytes over each transport since the start, summed over all routers, gone ones included; the sum never falls.

Routers send totals. One that is given up is folded into one counter, so that memory is bounded by the routers alive and
`KEPT_FOLDED` ids. Pure; knows no Ray and no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

KEPT_FOLDED = 1000
"""Ids of folded routers that are remembered: one that comes back after all is not counted a second time."""


class TransportTotals:
    """transport -> bytes, per router while it may report, in one counter after that."""

    def __init__(self) -> None:
        self._by_router: dict[str, Mapping[str, int]] = {}
        self._folded: Counter[str] = Counter()
        self._folded_ids: dict[str, None] = {}

    def take(self, router: str, sent: Mapping[str, int]) -> None:
        """sent: the totals of `router` since its start. Ignored of a router that was folded."""
        if router not in self._folded_ids:
            self._by_router[router] = sent

    def fold(self, router: str) -> None:
        """The router is given up: its bytes stay. What it may still report is lost."""
        sent = self._by_router.pop(router, None)
        if sent is None:
            return
        self._folded.update(sent)
        self._folded_ids[router] = None
        if len(self._folded_ids) > KEPT_FOLDED:
            del self._folded_ids[next(iter(self._folded_ids))]

    def total(self) -> Counter[str]:
        """transport -> bytes."""
        total = self._folded.copy()
        for sent in self._by_router.values():
            total.update(sent)
        return total

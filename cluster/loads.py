"""How many rows each expert got since the start, over all routers: what a placement for the next start is made from.

Routers send totals, not differences: a report that comes twice, late or out of order changes nothing, one that is lost
is made good by the next, and a Directory that restarts has the totals of every living router again within a period.
What only routers said that are gone by then is lost with it. Pure; knows no Ray, no HTTP and no file.
Dimension letters: E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.placement import Experts

ExpertRows = Mapping[int, npt.NDArray[np.int64]]
"""Layer -> int64 [E], rows of each expert by expert id."""

KEPT_STOPPED = 1000
"""Ids of routers that were folded are remembered for so many: a report overtaken by a last word is seconds old."""

DOMAIN = "recorded"
"""The one domain of the load file: requests do not say what they are about."""


@dataclass(frozen=True)
class LoadReport:
    """rows: what `router` has sent since its start. last: it stops, and will send no more.

    digest: of its model, in hex.
    """

    router: str
    rows: ExpertRows
    last: bool = False
    digest: str = ""


class RecordedLoads:
    """The sum over all routers, gone ones included; it never falls.

    A router that said its last word is folded into one array. One that crashed keeps an array of its own (120 kB for
    58 layers of 256 experts), because it may only have been out of reach, until it is given up by `fold`.
    """

    def __init__(self, groups: Iterable[Experts], digest: str = "") -> None:
        """groups: the experts of each; all experts there are together. digest: of the model they are of, in hex."""
        self._digest = digest
        experts: Counter[int] = Counter()
        for group in groups:
            experts.update({layer: len(ids) for layer, ids in group.items()})
        self._layers = dict(sorted(experts.items()))
        self._gone = {layer: np.zeros(experts, dtype=np.int64) for layer, experts in self._layers.items()}
        self._stopped: dict[str, None] = {}
        self._by_router: dict[str, ExpertRows] = {}
        self._risen = self._zeros()

    def take(self, report: LoadReport) -> bool:
        """Take over a report. False: it is of another model, which is also one of the same shape and other weights."""
        if report.digest != self._digest or {layer: len(rows) for layer, rows in report.rows.items()} != self._layers:
            return False
        if report.router in self._stopped:
            return True
        known = self._by_router.pop(report.router, None)
        rows = report.rows
        if known is not None:
            rows = {layer: np.maximum(known[layer], report.rows[layer]) for layer in self._layers}
            self._risen = {layer: self._risen[layer] + rows[layer] - known[layer] for layer in self._layers}
        self._by_router[report.router] = rows
        if report.last:
            self.fold(report.router)
        return True

    def fold(self, router: str) -> None:
        """The router will send no more, or is given up: its rows stay, its array goes. What it still sends is lost."""
        rows = self._by_router.pop(router, None)
        if rows is None:
            return
        self._stopped[router] = None
        if len(self._stopped) > KEPT_STOPPED:
            del self._stopped[next(iter(self._stopped))]
        self._gone = {layer: self._gone[layer] + rows[layer] for layer in self._layers}

    def as_load_file(self) -> dict[str, Any]:
        """Ready for JSON, as `cluster.placement.read_load` reads it; all zeros before the first row."""
        total = self.totals()
        return {"layers": list(total), "domains": {DOMAIN: [rows.tolist() for rows in total.values()]}}

    def totals(self) -> ExpertRows:
        """The sum; all zeros before the first row."""
        total = {layer: rows.copy() for layer, rows in self._gone.items()}
        for each in self._by_router.values():
            for layer, rows in each.items():
                total[layer] += rows
        return total

    def risen(self) -> ExpertRows:
        """What has come since each router was first heard: no rows that were counted before this sum was kept."""
        return self._risen  # replaced, never changed

    def _zeros(self) -> ExpertRows:
        return {layer: np.zeros(experts, dtype=np.int64) for layer, experts in self._layers.items()}

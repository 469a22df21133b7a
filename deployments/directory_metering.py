"""The Directory's metrics, told once a second from what it knows of the whole cluster. Pure; the clock is passed in.

A gauge that is told no more ends, so experts that leave the busiest ones end by themselves; counts of what was once
seen are told as 0 from then on. Dimension letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.config import HOME_POOL
from cluster.loads import ExpertRows
from cluster.membership import Replica, State, View
from cluster.metering import Meter
from cluster.metrics import (
    DEGRADED,
    EXPERT_ROWS_PER_S,
    IMBALANCE,
    POLICY_SILENCE_S,
    READY_REPLICAS,
    REPLICAS,
    ROUTERS,
    START_FAILURES,
)
from cluster.rates import Rate
from cluster.snapshot import ROUTER

MOST_SERIES = 600
"""Of rows by layer and expert, whatever the model: of 61 layers of 256 experts the 8 busiest of each layer and `other`
make 549. For 20 s after a new choice Ray also keeps those of the last one: up to twice as many are scraped. Over time
any expert may be among them: what a Prometheus keeps is bounded by all experts of the model."""
NAMED_S = 30.0
"""Which experts have series of their own is chosen no more often: Ray keeps a gauge for 20 s after it was last told, so
a choice anew each second would make far more series than are told."""
RATE_WINDOW_S = 15.0
"""As long as the usual time between two scrapes: shorter ones would show only what happened to be looked at."""
OTHER = "other"


@dataclass(frozen=True)
class Standing:
    """What the Directory knows at one moment.

    groups: all there are. ready: group -> replicas, as of `cluster.snapshot.ready_replicas`.
    failed_starts: part -> since the Directory's start.
    rows: since each router was first heard, so that a Directory that starts anew takes no totals for a rise.
    policy_silence_s: since the autoscaler was last heard; None where there is none.
    degraded: every reason of `/health` that does not keep requests from being answered, and whether it holds.
    """

    view: View
    ready: Mapping[str, int]
    groups: Sequence[str]
    routers: int
    failed_starts: Mapping[str, int]
    rows: ExpertRows
    policy_silence_s: float | None = None
    degraded: Mapping[str, bool] = field(default_factory=dict)


class DirectoryMetering:
    """Tells a meter where the Directory stands. standing: asked each time. clock: seconds, monotonic."""

    def __init__(self, standing: Callable[[], Standing], clock: Callable[[], float]) -> None:
        self._standing = standing
        self._clock = clock
        self._seen: set[tuple[str, str]] = set()
        self._rate = Rate(RATE_WINDOW_S)
        self._named: dict[int, list[int]] = {}
        self._named_at = float("-inf")

    def tell(self, meter: Meter) -> None:
        """A `Source`, once a second."""
        now = self._standing()
        self._tell_replicas(meter, now)
        meter.level(ROUTERS, now.routers)
        for part, count in {**dict.fromkeys((*now.groups, ROUTER), 0), **now.failed_starts}.items():
            meter.total(START_FAILURES, count, part=part)
        if now.policy_silence_s is not None:
            meter.level(POLICY_SILENCE_S, now.policy_silence_s)
        for reason, holds in now.degraded.items():
            meter.level(DEGRADED, float(holds), reason=reason)
        self._tell_rows(meter, now.rows)

    def _tell_replicas(self, meter: Meter, now: Standing) -> None:
        self._seen |= {(group, HOME_POOL) for group in now.groups} | {(r.group, r.pool) for r in now.view.replicas}
        for group, pool in sorted(self._seen):
            for state in State:
                count = _count(now.view.replicas, group, pool, state)
                meter.level(REPLICAS, count, group=group, pool=pool, state=state.value)
        for group, count in now.ready.items():
            meter.level(READY_REPLICAS, count, group=group)

    def _tell_rows(self, meter: Meter, rows: ExpertRows) -> None:
        self._rate.take(self._clock(), _padded(rows))
        per_s = self._rate.per_s()
        if per_s is None:
            return
        kept = busiest_kept(len(rows))
        if not 0 <= self._clock() - self._named_at < NAMED_S:
            self._named, self._named_at = {}, self._clock()
        for number, (layer, totals) in enumerate(rows.items()):
            of_layer = per_s[number, : len(totals)]
            named = self._named[layer] = filled(self._named.get(layer, []), of_layer, kept)
            for expert in named:
                if of_layer[expert] > 0:
                    meter.level(EXPERT_ROWS_PER_S, float(of_layer[expert]), layer=str(layer), expert=str(expert))
            other = float(np.delete(of_layer, named).sum())
            meter.level(EXPERT_ROWS_PER_S, other, layer=str(layer), expert=OTHER)
            if of_layer.any():  # a layer without rows is neither balanced nor not
                meter.level(IMBALANCE, float(of_layer.max() / of_layer.mean()), layer=str(layer))


def busiest_kept(layers: int) -> int:
    """How many experts of each of so many layers get series of their own: with `OTHER`, `MOST_SERIES` in all."""
    return max(1, MOST_SERIES // max(1, layers) - 1)


def filled(named: Sequence[int], rows_per_s: npt.NDArray[np.float64], kept: int) -> list[int]:
    """`named` and the busiest others of a layer with any rows, `kept` experts at most. rows_per_s: [E]."""
    free = kept - len(named)
    if free <= 0:
        return list(named)
    order = np.argsort(-rows_per_s, kind="stable")[:kept]
    return [*named, *[int(each) for each in order if rows_per_s[each] > 0 and each not in named][:free]]


def _count(replicas: Iterable[Replica], group: str, pool: str, state: State) -> int:
    return sum((replica.group, replica.pool, replica.state) == (group, pool, state) for replica in replicas)


def _padded(rows: ExpertRows) -> npt.NDArray[np.int64]:
    """[L, E]; layers with fewer experts are filled up with 0."""
    table = np.zeros((len(rows), max(map(len, rows.values()), default=0)), dtype=np.int64)
    for number, totals in enumerate(rows.values()):
        table[number, : len(totals)] = totals
    return table

"""Publishes what is declared in `cluster.metrics`, once a second, through whatever takes it: Ray, or a test's recorder.

    Meter     what a process tells: totals, levels, single events. Keeps no numbers but the last total of each series.
    Source    what is asked once a second to tell a Meter of a part of the process.
    Publishing  the task that asks.

Levels must be told again and again: Ray's agent forgets a gauge that was not set for two of its report intervals, which
is how series of things that are gone end. Knows no part of the system. Counting never fails what it counts.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cluster.metrics import MOST_OBSERVED, Metric

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class Instruments(Protocol):
    """Where numbers go. labels: exactly those that the metric declares."""

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A counter rises by `value` > 0."""

    def begin(self, metric: Metric, labels: Mapping[str, str]) -> None:
        """A counter stands at 0: Prometheus sees its first rise only if it has seen it before."""

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A gauge is `value` now."""

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A histogram gets one more value."""


class Meter:
    """One per process and thread. Labels are given by keyword: `meter.level(KV_TOKENS, 512)`,
    `meter.total(SENT_ROWS, 9, group="experts-0")`."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments
        self._totals: dict[_Series, float] = {}
        self._spreads: dict[_Series, _Spread] = {}

    def total(self, metric: Metric, value: float, **labels: str) -> None:
        """A counter stands at `value` by the sender's own count; what it has risen since the last time is published."""
        key = _series(metric, labels)
        before = self._totals.get(key)
        rise = value - (before or 0.0)
        if rise > 0:
            self._instruments.add(metric, rise, labels)
        elif before is None:
            self._instruments.begin(metric, labels)
        self._totals[key] = value

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None:
        """A counter rises; by 0 it begins."""
        if by > 0:
            self._instruments.add(metric, by, labels)
        else:
            self._instruments.begin(metric, labels)

    def level(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge is at `value`."""
        self._instruments.set(metric, value, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        self._instruments.observe(metric, value, labels)

    def spread(self, metric: Metric, counts: Sequence[int], **labels: str) -> None:
        """A histogram's values by the sender's own count, as of `Tally`, published as the middles of their buckets.

        Of what has come since the last time about `MOST_OBSERVED` are published at most, of each bucket the same share.
        """
        key = _series(metric, labels)
        spread = self._spreads.get(key)
        if spread is None:
            spread = self._spreads[key] = _Spread(len(counts))
        for bucket, times in enumerate(spread.due(counts)):
            for _ in range(times):
                self._instruments.observe(metric, middle(metric, bucket), labels)


_Series = tuple[str, tuple[tuple[str, str], ...]]


def _series(metric: Metric, labels: Mapping[str, str]) -> _Series:
    return metric.name, tuple(sorted(labels.items()))


class _Spread:
    """What of each bucket has been counted, and what part of a value is still owed."""

    def __init__(self, buckets: int) -> None:
        self._counted = [0] * buckets
        self._owed = [0.0] * buckets

    def due(self, counts: Sequence[int]) -> list[int]:
        """How often each bucket is to be published now. What is cut off is carried over, so that rare values show."""
        counted = list(counts)  # the sender goes on counting
        new = [now - before for now, before in zip(counted, self._counted, strict=True)]
        self._counted = counted
        share = min(1.0, MOST_OBSERVED / max(1, sum(new)))
        owed = [rest + share * each for rest, each in zip(self._owed, new, strict=True)]
        due = [int(each + 1e-9) for each in owed]
        self._owed = [each - whole for each, whole in zip(owed, due, strict=True)]
        return due


def middle(metric: Metric, bucket: int) -> float:
    """A value for all those that fell into the bucket; above the last bound that times two, as Ray has it."""
    bounds = (0.0, *metric.buckets, 3.0 * metric.buckets[-1])
    return (bounds[bucket] + bounds[bucket + 1]) / 2


Source = Callable[[Meter], None]
"""Tells a meter how things stand now; called in the event loop, must not block."""


class Publishing:
    """Asks `source` once a second until `stop`. A source that raises is logged, once for each new reason."""

    def __init__(self, source: Source, meter: Meter, period_s: float = PERIOD_S) -> None:
        self._source = source
        self._meter = meter
        self._period_s = period_s
        self._complaint = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """In a running event loop; again it changes nothing."""
        if self._task is not None and not self._task.done():
            return
        # In a context of its own: Serve cancels what a request has started when its client has gone.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    def turn(self) -> None:
        """Ask once."""
        try:
            self._source(self._meter)
            self._complaint = ""
        except Exception as error:
            if repr(error) != self._complaint:
                self._complaint = repr(error)
                logger.exception("metrics cannot be published")

    def stop(self) -> None:
        """Ask a last time and ask no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self.turn()

    async def _run(self) -> None:
        while True:
            self.turn()
            await asyncio.sleep(self._period_s)

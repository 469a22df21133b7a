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
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.metrics import Metric

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class Instruments(Protocol):
    """Where numbers go. labels: exactly those that the metric declares."""

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A counter rises by `value` > 0."""

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A gauge is `value` now."""

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """A histogram gets one more value."""


class Meter:
    """One per process and thread. Labels are given by keyword: `meter.level(KV_TOKENS, 512)`,
    `meter.total(SENT_ROWS, 9, group="experts-0")`."""

    def __init__(self, instruments: Instruments) -> None:
        self._instruments = instruments
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def total(self, metric: Metric, value: float, **labels: str) -> None:
        """A counter stands at `value` by the sender's own count; what it has risen since the last time is published."""
        key = (metric.name, tuple(sorted(labels.items())))
        rise = value - self._totals.get(key, 0.0)
        if rise > 0:
            self._instruments.add(metric, rise, labels)
        if rise:
            self._totals[key] = value

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None:
        """A counter rises."""
        if by > 0:
            self._instruments.add(metric, by, labels)

    def level(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge is at `value`."""
        self._instruments.set(metric, value, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        self._instruments.observe(metric, value, labels)


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
        """In a running event loop."""
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

"""Parts whose signals have kept anything from being decided for too long: what `/health` names under `signals`. Pure.

A part has no signals for a moment whenever its replicas come or go (`observer`); that is no stall. Nor is a part of
which no replica runs, or anything where no router does: those are missing, which is told elsewhere. Where nothing is
asked, signals are there and say so: an idle cluster is not stalled.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoscale.signals import ROUTER, Signals


class Stalls:
    """Remembers since when each part has had no signals. now: seconds of one clock, which may jump back."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def take(self, signals: Signals, ages: Mapping[str, float], max_age_s: float, now: float) -> tuple[str, ...]:
        """The stalled groups, or the unit of the routers. ages: as of `Observer.ages`, only of parts that run."""
        without = [part for part in ages if ROUTER in ages and _missing(part, signals)]
        self._since = {part: min(now, self._since.get(part, now)) for part in without}
        return tuple(
            part
            for part, age_s in ages.items()
            if age_s > max_age_s or (part in self._since and now - self._since[part] > max_age_s)
        )


def _missing(part: str, signals: Signals) -> bool:
    return (signals.router if part == ROUTER else signals.groups.get(part)) is None

"""Moments of schedules: five cron fields in a time zone, with Debian cron's rules where clocks are put on or back.

A moment in the hour that clocks skip comes when they have been put on; one in the hour they repeat comes once, the
first time. Expressions with a `*` in the minute or the hour go by elapsed time and come in both. The arithmetic is
`cronsim`'s. Time zones are read from the pinned `tzdata` package alone: the same on every machine, in slim images too.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from cluster.sentences import Fault, refuse

MAX_CHARACTERS = 200
_CRON = (
    "five cron fields (minute, hour, day of month, month, day of week) that some moment matches, as '0 8 * * MON-FRI'"
)
_ZONE = "Input should be an IANA time zone such as 'UTC' or 'Europe/Berlin'"
_ANY_MOMENT = datetime(2024, 1, 1, tzinfo=UTC)


def check_cron(expression: str) -> str:
    """The expression, if it has five valid fields and some moment matches it."""
    try:
        # The library takes seconds too, and recurses into terms.
        if len(expression) > MAX_CHARACTERS or len(expression.split()) != 5:
            raise CronSimError
        next(CronSim(expression, _ANY_MOMENT))
    except (CronSimError, ValueError, AssertionError, StopIteration, OverflowError):
        refuse([Fault("", expression, f"Input should be {_CRON}")])
    return expression


def check_timezone(name: str) -> str:
    """The name, if `tzdata` has it."""
    if name not in _zone_names():
        refuse([Fault("", name, _ZONE)])
    return name


def started_within(expression: str, timezone: str, at: datetime, duration: timedelta) -> datetime | None:
    """The earliest moment of the expression in (at - duration, at]; None where there is none.

    at: aware. Both arguments have passed the checks above.
    """
    try:
        after = (at - duration).astimezone(_zone(timezone))
        # Looking forward from a naive local time, a moment of the repeated hour may come that lies behind `after`.
        for moment in CronSim(expression, after):
            found = moment.astimezone(UTC)
            if found > at - duration:
                return found if found <= at else None
    except (OverflowError, ValueError):
        # The ends of the calendar.
        pass
    return None


@cache
def _zone_names() -> frozenset[str]:
    return frozenset((resources.files("tzdata") / "zones").read_text(encoding="utf-8").split())


@cache
def _zone(name: str) -> ZoneInfo:
    with resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)

"""Which schedule entries hold at a moment, and the policy under them. Pure: the moment is passed in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from autoscale.cron import started_within
from autoscale.spec import PolicySpec, ScheduleEntry

MINUTE = timedelta(minutes=1)


def in_force(spec: PolicySpec, at: datetime) -> PolicySpec:
    """`spec`, as it was read, under the schedule entries that are active at `at`.

    Their bounds hold for the groups their patterns match, and for routers; later entries win. Where an entry's minimum
    exceeds a group's maximum, the maximum is raised to it; where its maximum is below the minimum, the minimum is
    lowered. An entry is active from each moment of its cron expression for `duration_s`, the end excluded.

    at: aware; ValueError otherwise.
    """
    return Schedule(spec).in_force(at)


class Schedule:
    """`in_force` for one policy, many times: the same object is returned until something changes.

    Entries are looked at when a minute begins, as cron does, when one ends, and when `at` has jumped back.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._active: tuple[ScheduleEntry, ...] = ()
        self._current = spec
        # The span of time for which `_current` is known to hold; empty at first.
        self._since = self._until = datetime.max.replace(tzinfo=UTC)

    def in_force(self, at: datetime) -> PolicySpec:
        """See the function of this name."""
        if at.tzinfo is None:
            raise ValueError(f"the moment {at!r} has no time zone")
        if self._spec.schedule and not self._since <= at < self._until:
            self._look(at.astimezone(UTC))
        return self._current

    def _look(self, at: datetime) -> None:
        active, until = [], _next_minute(at)
        for entry in self._spec.schedule:
            duration = timedelta(seconds=entry.duration_s)
            started = started_within(entry.cron, entry.timezone, at, duration)
            if started is not None:
                active.append(entry)
                # The earliest start ends first; an entry that has started again since is found by the next look.
                until = min(until, started + duration)
        if tuple(active) != self._active:
            self._active = tuple(active)
            self._current = self._spec.under(self._active) if active else self._spec
        self._since, self._until = at, until


def _next_minute(at: datetime) -> datetime:
    """The end of the minute of `at`, which is in UTC; the end of the calendar is its own."""
    minute = at.replace(second=0, microsecond=0)
    return minute + MINUTE if minute <= datetime.max.replace(tzinfo=UTC) - MINUTE else at

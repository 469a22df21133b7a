"""Growth that fails: replicas not ready within their start-up budget are given up, and a back-off follows. Pure.

    target rises ──────────── budget_s ────────────> given up ──── back-off ────> may be asked for again
      (or a replica is lost)                           target: what is ready      doubles with every failure, up to 1 h

The clock runs from the first of those that start, whatever is asked for meanwhile. It starts anew with each one that
becomes ready, as starts work then, and with each one that is lost, as its successor has a start before it. More ready
replicas than when it failed end the row of failures; as many as then do not, since they may be old ones that Serve
restarted. Only the unit where it failed waits: another pool may grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from autoscale.pools import Scalable, Unit
from autoscale.signals import Reason
from autoscale.spec import Startup

LONGEST_BACKOFF_S = 3600.0
MOST_DOUBLINGS = 16


class Start(NamedTuple):
    """What is remembered of one unit. since: from when replicas are starting, None where none are.

    blocked_until: the end of the back-off, None where there is none. failures: in a row. had: ready ones at the last.
    """

    ready: int
    since: float | None = None
    failures: int = 0
    blocked_until: float | None = None
    had: int = 0

    def rebased(self, before: float, now: float) -> Start:
        """After the clock jumped back: starting begins anew, what is left of a back-off stays."""
        left = None if self.blocked_until is None else min(LONGEST_BACKOFF_S, max(0.0, self.blocked_until - before))
        return self._replace(
            since=None if self.since is None else now, blocked_until=None if left is None else now + left
        )


def watch(listed: list[Scalable], last: Mapping[str, Start], now: float) -> dict[str, Start]:
    """Follow every unit; give up what is late: its planned target falls, its back-off begins. -> unit -> `Start`."""
    starts = {}
    for each in listed:
        for unit in each.units:
            name = unit.facts.name
            start = _follow(last.get(name), unit, now)
            if start.since is not None and now - start.since > each.scaling.startup.budget_s:
                start = _give_up(start, unit, each.scaling.startup, now)
            unit.blocked = start.blocked_until is not None
            starts[name] = start
    return starts


def given_up(starts: Mapping[str, Start], last: Mapping[str, Start]) -> tuple[str, ...]:
    """The units with a new back-off."""
    return tuple(
        name
        for name, start in starts.items()
        if start.blocked_until is not None and (name not in last or start.blocked_until != last[name].blocked_until)
    )


def _follow(last: Start | None, unit: Unit, now: float) -> Start:
    starting = unit.before > unit.ready
    if last is None:
        return Start(unit.ready, now if starting else None)
    since = last.since if last.since is not None and unit.ready == last.ready else now
    failures, until = last.failures, last.blocked_until
    if unit.ready > last.had:
        failures, until = 0, None
    if until is not None and now >= until:
        until = None
    return Start(unit.ready, since if starting else None, failures, until, last.had)


def _give_up(start: Start, unit: Unit, startup: Startup, now: float) -> Start:
    backoff_s = min(LONGEST_BACKOFF_S, startup.backoff_s * 2.0 ** min(MOST_DOUBLINGS, start.failures))
    unit.target = min(unit.before, max(unit.ready, unit.floor))
    lost = unit.before - unit.target
    if lost:
        were = "a replica was" if lost == 1 else f"{lost} replicas were"
        is_ = "is" if lost == 1 else "are"
        why = f"{were} not ready after {startup.budget_s:g} s and {is_} given up; no new one for {backoff_s:g} s"
        unit.because(Reason.GIVEN_UP, why)
    failures = min(MOST_DOUBLINGS, start.failures + 1)
    return start._replace(since=now, failures=failures, blocked_until=now + backoff_s, had=unit.ready)

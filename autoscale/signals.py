"""What a scaling decision is made from and what comes out of it: plain data, the words of the control path.

Pure; knows no Ray, no clock and no policy. A *unit* is one Serve deployment whose replicas the policy counts: a group
in a pool (`experts-0`, `experts-0-h100`) or the routers (`Router`). Rates are per second. Numbers nobody knows are
None, never zero: a missing number means no decision, a zero means an idle cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.config import HOME_POOL, deployment_name

ROUTER = "Router"
"""The unit of the router replicas."""


@dataclass(frozen=True)
class UnitFacts:
    """What one replica of a unit takes, fixed by the deployed configuration.

    group: None for the routers. speed_rows_per_s: expected before one was measured; None where nobody knows.
    selector: the labels of nodes on which it may run, in Ray's words.
    """

    name: str
    group: str | None
    pool: str = HOME_POOL
    gpus: float = 0.0
    cpus: float = 0.0
    speed_rows_per_s: float | None = None
    selector: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fleet:
    """Everything that can be scaled.

    max_replicas_hard: Serve's own bound on each unit of a group or of the routers.
    fixed: (unit, replicas) of those whose number the configuration fixes: nobody scales them, a budget counts them.
    """

    units: Mapping[str, UnitFacts]
    max_replicas_hard: int
    fixed: tuple[tuple[UnitFacts, int], ...] = ()

    def of(self, group: str) -> tuple[UnitFacts, ...]:
        """The units of a group, its home pool first."""
        found = [unit for unit in self.units.values() if unit.group == group]
        return tuple(sorted(found, key=lambda unit: (unit.name != deployment_name(group), unit.name)))

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups in the order of the units."""
        return tuple(dict.fromkeys(unit.group for unit in self.units.values() if unit.group is not None))


@dataclass(frozen=True)
class UnitCounts:
    """Replicas of one unit.

    ready: answer now. target: what was last asked for; those above `ready` are starting.
    leaving: no longer asked for, but they still hold their device.
    """

    ready: int
    target: int
    leaving: int = 0


@dataclass(frozen=True)
class GroupLoad:
    """The load of one group over the last window, all routers and replicas together.

    offered_rows_per_s: rows of one layer each, sent by routers. coming_rows_per_s: what prompts that do not decode yet
    will add, by the experts their prefill has shown (by the present mix where it has shown none).
    wait_share: share of the routers' step time from a scatter to this group's last row; critical_share: the part of it
    after all other groups had answered; service_share: the part of the wait share that more replicas shorten, that is
    computing, not the hop (None: nobody knows, take all of it). None where no step ran.
    speed_rows_per_s: pool -> mean measured speed of one ready replica.
    utilization: mean busy share of the ready replicas. queue_rows: rows that wait in them now.
    """

    offered_rows_per_s: float
    wait_share: float | None = None
    critical_share: float | None = None
    service_share: float | None = None
    coming_rows_per_s: float = 0.0
    speed_rows_per_s: Mapping[str, float] = field(default_factory=dict)
    utilization: float = 0.0
    queue_rows: float = 0.0


@dataclass(frozen=True)
class RouterLoad:
    """The load of all routers together over the last window.

    running, waiting: now, a request with n choices counting n times. kv_used_share: of the fullest router.
    Percentiles are None where nobody waited.
    """

    running: float
    waiting: float
    kv_used_share: float = 0.0
    ttft_p95_ms: float | None = None
    tpot_p95_ms: float | None = None


@dataclass(frozen=True)
class Signals:
    """One moment. counts: of every unit. groups, router: None or absent where stale or missing: no decision there."""

    counts: Mapping[str, UnitCounts]
    groups: Mapping[str, GroupLoad | None]
    router: RouterLoad | None


class Reason(StrEnum):
    """Every kind of reason there is for a change: what can be counted, where the sentence says the rest."""

    MINIMUM = "minimum"
    """Less than the policy, or Serve, allows."""
    MAXIMUM = "maximum"
    """More than the policy, or Serve, allows."""
    BUDGET = "budget"
    """The budget holds less than is asked for."""
    UTILIZATION = "utilization"
    """Rows offered, or to come, are more than replicas should have."""
    CRITICAL_PATH = "critical_path"
    """Routers wait for the group longer than they should."""
    REQUESTS = "requests"
    """Routers have more requests than they should."""
    LATENCY = "latency"
    """The first token, or the next one, takes longer than promised."""
    FIT = "fit"
    """The load fits fewer."""
    PREEMPTED = "preempted"
    """The load fits fewer, and another group needs the room."""
    GIVEN_UP = "given_up"
    """Replicas were not ready in time."""


GROWTH = frozenset({Reason.MINIMUM, Reason.UTILIZATION, Reason.CRITICAL_PATH, Reason.REQUESTS, Reason.LATENCY})
"""Reasons for more replicas; all others are for fewer."""


@dataclass(frozen=True)
class Change:
    """One change of one unit's target, with a reason a person understands, and of which kind that is."""

    unit: str
    group: str | None
    pool: str
    before: int
    after: int
    reason: str
    kind: Reason

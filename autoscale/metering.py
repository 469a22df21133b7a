"""The autoscaler's metrics: the tick stores numbers here, the thread of `controller_link` tells them once a second.

A tick may neither block nor fail, so what is stored is assigned whole and never changed after: the two need no lock.
Knows no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from autoscale.policy import Decision
from autoscale.signals import GROWTH, ROUTER, Fleet, Reason, UnitCounts, UnitFacts
from cluster.metering import Meter
from cluster.metrics import (
    ACTUAL_REPLICAS,
    DECISIONS,
    GIVEN_UP_STARTS,
    HELD_BACK,
    POLICY_ERROR,
    POLICY_FAILURES,
    POLICY_TICKS,
    SIGNAL_AGE_S,
    STARTING_REPLICAS,
    TARGET_REPLICAS,
)

Key = TypeVar("Key")


@dataclass(frozen=True)
class Levels:
    """How things stand after a tick.

    replicas: (group, pool) -> (target, ready, starting). signal_age_s: part -> as of `Observer.ages`.
    """

    replicas: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    signal_age_s: Mapping[str, float] = field(default_factory=dict)
    held_back: int = 0


class PolicyMetering:
    """Written by the controller's thread, read by the link's."""

    def __init__(self) -> None:
        self._ticks = 0
        self._failures = 0
        self._policy_error: bool | None = None
        self._levels = Levels()
        self._decisions: Counter[tuple[str, str, str]] = Counter()
        self._given_up: Counter[tuple[str, str]] = Counter()

    def asked(self) -> None:
        """Serve asked the policy."""
        self._ticks += 1

    def failed(self) -> None:
        """The policy failed, and kept its last decision."""
        self._failures += 1

    def file_is(self, error: str | None) -> None:
        """Why the policy file as it is on disk cannot be used; None where it can."""
        self._policy_error = error is not None

    def decided(
        self, fleet: Fleet, counts: Mapping[str, UnitCounts], decision: Decision, ages: Mapping[str, float]
    ) -> None:
        """What was counted and decided; `ages` as of `Observer.ages`."""
        replicas = {}
        for name, count in counts.items():
            target = decision.targets.get(name, count.target)
            replicas[_labels(fleet.units[name])] = (target, count.ready, max(0, target - count.ready))
        self._levels = Levels(replicas, dict(ages), len(decision.held_back))
        changes = [(change.group or ROUTER, _direction(change.kind), change.kind.value) for change in decision.changes]
        self._decisions = _more(self._decisions, changes)
        self._given_up = _more(self._given_up, [_labels(fleet.units[name]) for name in decision.given_up])

    def tell(self, meter: Meter) -> None:
        """A `Source`, once a second, in the link's thread."""
        levels = self._levels
        for (group, pool), (target, ready, starting) in levels.replicas.items():
            meter.level(TARGET_REPLICAS, target, group=group, pool=pool)
            meter.level(ACTUAL_REPLICAS, ready, group=group, pool=pool)
            meter.level(STARTING_REPLICAS, starting, group=group, pool=pool)
        for part, age_s in levels.signal_age_s.items():
            meter.level(SIGNAL_AGE_S, age_s, part=part)
        meter.level(HELD_BACK, levels.held_back)
        if self._policy_error is not None:
            meter.level(POLICY_ERROR, float(self._policy_error))
        meter.total(POLICY_TICKS, self._ticks)
        meter.total(POLICY_FAILURES, self._failures)
        # From 0 on, as Prometheus sees the first one only then.
        groups = {group for group, _ in levels.replicas}
        begun = {(group, _direction(reason), reason.value): 0 for group in groups for reason in Reason}
        for (group, direction, reason), count in {**begun, **self._decisions}.items():
            meter.total(DECISIONS, count, group=group, direction=direction, reason=reason)
        for (group, pool), count in {**dict.fromkeys(levels.replicas, 0), **self._given_up}.items():
            meter.total(GIVEN_UP_STARTS, count, group=group, pool=pool)


def _direction(reason: Reason) -> str:
    return "up" if reason in GROWTH else "down"


def _labels(unit: UnitFacts) -> tuple[str, str]:
    return unit.group or ROUTER, unit.pool


def _more(counted: Counter[Key], keys: Collection[Key]) -> Counter[Key]:
    """Another counter, where anything is new: the old one may be being read."""
    return counted + Counter(keys) if keys else counted

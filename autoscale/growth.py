"""Who gets what the budget has: minima first, then routers, then groups, where a replica shortens the step most. Pure.

A wish that the budget denies stays a wish: it is told, not made. If some group clearly does not need a replica that
stands in the way of a wish, it loses it at once; the wish is granted when that replica is gone.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import IntEnum

from autoscale import reasons
from autoscale.budget import Ledger
from autoscale.needs import gain
from autoscale.pools import ROUNDING, Scalable, Unit
from autoscale.signals import Reason


class Kind(IntEnum):
    """Why a wish is a wish, the most urgent first. An SLO step ranks as any other need does: by what it gains."""

    MINIMUM = 0
    ROUTERS = 1
    NEED = 2
    SLO = 3


_REASONS = {Kind.MINIMUM: Reason.MINIMUM, Kind.ROUTERS: Reason.REQUESTS, Kind.SLO: Reason.LATENCY}


@dataclass(slots=True)
class Wish:
    """At most `steps` replicas more, until the planned capacity is `goal`."""

    each: Scalable
    kind: Kind
    why: str
    steps: int
    goal: float
    given: int = 0

    @property
    def is_open(self) -> bool:
        """Whether something is still wanted."""
        return self.given < self.steps and self.each.capacity * (1 + ROUNDING) < self.goal

    @property
    def reason(self) -> Reason:
        """The kind of reason that a grant has."""
        if self.kind is Kind.NEED:
            critical = self.each.need is not None and self.each.need.critical
            return Reason.CRITICAL_PATH if critical else Reason.UTILIZATION
        return _REASONS[self.kind]


class Growth:
    """The wishes of one decision. granted: those that got at least one replica. held_back: sentences for the others."""

    def __init__(self, ledger: Ledger, horizon_s: float) -> None:
        self.horizon_s = horizon_s
        self.granted: list[Wish] = []
        self.held_back: list[str] = []
        self._ledger = ledger
        self._wishes: dict[str, Wish] = {}
        self._starved: list[Wish] = []

    def wish(self, wish: Wish) -> bool:
        """One wish for each group counts, the first one. -> whether this one does."""
        return self._wishes.setdefault(wish.each.name, wish) is wish

    def deny(self, each: Scalable, why: str, because: str) -> None:
        """A wish that is none, because of something other than the budget."""
        self.held_back.append(f"{each.name}: {why}, {each.total} stay ({because})")

    def next_gain(self, each: Scalable) -> float:
        """By which share of its time the step is shorter with one replica more, where it would go."""
        unit = each.to_grow(self._ledger.has_room)
        return 0.0 if unit is None or each.need is None else _gain(each, unit)

    def share_out(self) -> None:
        """Grant replica by replica, the best next one first. Deterministic: ties go by name."""
        queue = [(self._rank(wish), wish.each.name) for wish in self._wishes.values()]
        heapq.heapify(queue)
        while queue:
            _, name = heapq.heappop(queue)
            wish = self._wishes[name]
            unit = wish.each.to_grow(self._ledger.has_room)
            if unit is None or not self._ledger.grow(unit):
                self._deny(wish)
                continue
            wish.given += 1
            unit.because(wish.reason, wish.why)
            if wish.given == 1:
                self.granted.append(wish)
            if wish.is_open:
                heapq.heappush(queue, (self._rank(wish), name))

    def preempt(self, listed: list[Scalable], last_at: float | None, now: float) -> float | None:
        """Take one replica that is not needed for a wish that the budget denies. -> when that was last done."""
        for wish in self._starved:
            if last_at is not None and now - last_at < wish.each.scaling.upscale.after_s:
                continue
            places = sorted(wish.each.open(), key=lambda unit: -unit.value)
            if (coming := next(filter(self._ledger.comes, places), None)) is not None:
                self._ledger.expects(coming)
                continue
            for place in places:
                if self._take_for(wish, place, listed):
                    return now
        return last_at

    def _take_for(self, wish: Wish, place: Unit, listed: list[Scalable]) -> bool:
        lacking = self._ledger.lacking(place)
        spare = [
            (_value(each, unit), each, unit)
            for each in listed
            if each.group is not None and each.need is not None and each.name not in self._wishes
            for unit in each.units
            if unit.target == unit.before and self._ledger.frees(unit, lacking) and each.fits_without(unit)
        ]
        if not spare:
            return False
        _, each, unit = min(spare, key=lambda candidate: candidate[0])
        self._ledger.shrink(unit)
        unit.because(Reason.PREEMPTED, f"{reasons.fit(each, each.total)}, and {wish.each.name} needs the room")
        return True

    def _rank(self, wish: Wish) -> tuple[int, float, float, str]:
        """The smallest first."""
        each = wish.each
        unit = each.to_grow(self._ledger.has_room)
        kind = min(wish.kind, Kind.NEED)
        if unit is None or each.need is None:
            return kind, 0.0, 0.0, each.name
        pressure = each.need.up / each.capacity if each.capacity > 0 else each.need.up
        return kind, -_gain(each, unit) / unit.cost, -pressure, each.name

    def _deny(self, wish: Wish) -> None:
        """No place for it, or for the rest of it."""
        each = wish.each
        places = sorted(each.open(), key=lambda unit: -unit.value)
        if places:
            self._starved.append(wish)
            self.deny(each, wish.why, self._ledger.describe(self._ledger.lacking(places[0])))
        elif any(unit.allowed and unit.blocked for unit in each.units):
            self.deny(each, wish.why, "growth failed, and the back-off has not passed")
        else:
            self.deny(each, wish.why, "Serve's own bound is reached in every pool")


def _gain(each: Scalable, unit: Unit) -> float:
    """Of one replica more in `unit`."""
    assert each.need is not None
    return gain(each.need, each.ready_capacity, each.capacity, each.capacity + unit.speed)


def _value(each: Scalable, unit: Unit) -> tuple[float, float, str]:
    """Of one replica of `unit`: what its loss costs the step, and how much of it the load takes."""
    assert each.need is not None
    loss = -gain(each.need, each.ready_capacity, each.capacity, each.capacity - unit.speed)
    return loss / unit.cost, each.need.up / max(ROUNDING, each.capacity), unit.facts.name

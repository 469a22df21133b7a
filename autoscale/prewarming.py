"""Which replicas will be wanted one machine's lead from now: minima of schedules, and growth that is foreseen. Pure.

    now ──────────────── lead_s ────────────────>
     │  a schedule entry that holds now, or begins until then, and asks for more than the file's own minimum
     └  a trend that the forecast believes: today's replicas x (load then / load at the forecast's own horizon)

Replicas are given their places as a decision would: best pool first, within budgets and bounds; machines that no
decision could use are not asked for. A foreseen peak is held on to for `lead_s` after it was last foreseen, so that a
load that flickers moves no machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from math import ceil

from autoscale.budget import Ledger
from autoscale.cron import started_within
from autoscale.forecast import Forecaster
from autoscale.measure import Watched
from autoscale.pools import ROUNDING, Scalable, scalables
from autoscale.schedule import in_force
from autoscale.signals import ROUTER, Fleet, Signals
from autoscale.spec import PolicySpec
from cluster.nodes.prewarm import Seat


class Outlook:
    """What is foreseen, remembered for as long as a machine takes to come. All times are those of one clock."""

    def __init__(self) -> None:
        self._foreseen: dict[str, tuple[int, float]] = {}
        self._since: float | None = None

    def may_release(self, spec: PolicySpec, now: float) -> bool:
        """Whether what is not wanted now was not a lead ago either: a restart has forgotten what was foreseen."""
        if self._since is None or now < self._since:
            self._since = now
        lead_s = 0.0 if spec.prewarm is None or not spec.prewarm.forecast else spec.prewarm.lead_s
        return now - self._since >= lead_s

    def seats(
        self,
        spec: PolicySpec,
        fleet: Fleet,
        signals: Signals,
        watched: Mapping[str, Watched],
        now: float,
        at: datetime,
    ) -> tuple[Seat, ...]:
        """The replicas there should be a lead from now, those of peaks marked; () where no peak comes.

        spec: as it was read, its budget in numbers. at: `now` by the calendar, aware.
        """
        if spec.prewarm is None:
            return ()
        listed = scalables(signals, spec, fleet)
        wanted = self._scheduled(spec, listed, at)
        if spec.prewarm.forecast:
            for name, replicas in self._foresee(spec, listed, watched, now).items():
                wanted[name] = max(wanted.get(name, 0), replicas)
        return _placed(listed, wanted, spec, fleet) if wanted else ()

    def _scheduled(self, spec: PolicySpec, listed: list[Scalable], at: datetime) -> dict[str, int]:
        """Who has a minimum now or until then that is more than the file's own -> the most it is."""
        assert spec.prewarm is not None
        lead = timedelta(seconds=spec.prewarm.lead_s)
        starts = [started_within(entry.cron, entry.timezone, at + lead, lead) for entry in spec.schedule]
        moments = {at, *(start for start in starts if start is not None)} if spec.schedule else set()
        wanted: dict[str, int] = {}
        for policy in (in_force(spec, moment) for moment in moments):
            for each in listed:
                least, usual = _minimum(policy, each), _minimum(spec, each)
                if least > usual:
                    wanted[each.name] = max(wanted.get(each.name, 0), least)
        return wanted

    def _foresee(
        self, spec: PolicySpec, listed: list[Scalable], watched: Mapping[str, Watched], now: float
    ) -> dict[str, int]:
        """Whose load is expected to rise -> the replicas that takes, now or a while ago."""
        assert spec.prewarm is not None
        lead_s = spec.prewarm.lead_s
        far = spec.forecast.model_copy(update={"horizon_s": max(lead_s, spec.forecast.horizon_s)})
        near_by, far_off = (Forecaster(each, spec.signals.window_s, now) for each in (spec.forecast, far))
        for each in listed:
            seen = watched.get(each.name)
            if seen is None or seen.trend is None or seen.trend.level <= 0:
                continue
            level = seen.trend.level
            ratio = (level + far_off.rise(seen.trend)) / (level + near_by.rise(seen.trend))
            replicas = min(each.maximum, ceil(each.total * ratio - ROUNDING))
            if replicas > each.total and replicas >= self._foreseen.get(each.name, (0, now))[0]:
                self._foreseen[each.name] = (replicas, now + lead_s)
        self._foreseen = {
            name: (replicas, until) for name, (replicas, until) in self._foreseen.items() if 0 <= until - now <= lead_s
        }
        return {name: replicas for name, (replicas, _) in self._foreseen.items()}


def _minimum(policy: PolicySpec, each: Scalable) -> int:
    return policy.router.min_replicas if each.group is None else policy.scaling(each.group).min_replicas


def _placed(listed: list[Scalable], wanted: Mapping[str, int], spec: PolicySpec, fleet: Fleet) -> tuple[Seat, ...]:
    """Every unit's replicas once those wanted have found their places, as far as budgets let them."""
    ledger = Ledger(listed, spec, fleet.fixed)
    seats = [Seat(unit.name, count, unit.gpus, unit.cpus, unit.selector, peak=False) for unit, count in fleet.fixed]
    for each in listed:
        while each.total < wanted.get(each.name, 0) and (unit := each.to_grow(ledger.has_room)) is not None:
            ledger.grow(unit)
        for unit in each.units:
            facts = unit.facts
            if unit.target:
                peak = each.name in wanted
                seats.append(Seat(facts.name, unit.target, facts.gpus, facts.cpus, facts.selector, peak))
    return tuple(sorted(seats, key=lambda seat: (seat.name != ROUTER, seat.name)))

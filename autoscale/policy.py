"""The decision: how many replicas every unit should have now. Pure: signals, policy, state and time in, targets out.

    load of groups and routers ──> forecast ──> need per group (utilisation, critical path, SLO) ──> bounds, schedules
        ──> hysteresis and delays ──> pools ──> budget ──> targets, each change with its reason

Knows no Ray, no file and no clock. It never raises on any signals, state or `now`, however absurd.

`decide` is the table of contents. Its steps work on a list of `Scalable` (`pools`): working copies of all groups and of
the routers, whose planned targets they change. They are in `startup` (growth that failed), `measure` and `needs` (what
the load needs), `limits` (bounds, an exceeded budget), `growth` (who gets what the budget has), and below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscale import limits, reasons, startup
from autoscale.budget import Ledger
from autoscale.forecast import Forecaster
from autoscale.growth import Growth, Kind, Wish
from autoscale.measure import Watched, measure
from autoscale.needs import gain, is_usable_router
from autoscale.pools import ROUNDING, Scalable, scalables
from autoscale.signals import Change, Fleet, Reason, RouterLoad, Signals
from autoscale.spec import PolicySpec, RouterScaling
from autoscale.startup import Start

WORTHWHILE = 0.05
"""Share of the step time that one more replica must save to be a remedy for a latency that is too long."""
SHORTEST_PAUSE_S = 1.0
NOTICEABLE = 0.01
MOST_AT_ONCE = 64
"""Replicas added to one group by one decision, whatever `max_step` says."""


@dataclass(frozen=True)
class PolicyState:
    """What a decision must remember. Empty after a restart of the Serve controller: targets then stay until the delays
    have passed once more.

    now: of the last decision. watched: group, or the routers' unit -> its smoothed load. starts: unit -> what starts.
    up_since, down_since: since when a need is above, or fits below the target. slo_at, preempted_at: the last one.
    """

    now: float | None = None
    watched: Mapping[str, Watched] = field(default_factory=dict)
    starts: Mapping[str, Start] = field(default_factory=dict)
    up_since: Mapping[str, float] = field(default_factory=dict)
    down_since: Mapping[str, float] = field(default_factory=dict)
    slo_at: float | None = None
    preempted_at: float | None = None

    def at(self, now: float) -> tuple[float, PolicyState]:
        """(a time that is a number, the state as it is then). A jump back starts all timers anew."""
        before = self.now if self.now is not None else 0.0
        if not math.isfinite(now):
            return before, self
        if self.now is None or now >= self.now:
            return now, self
        return now, PolicyState(
            now,
            {name: watched.rebased(now) for name, watched in self.watched.items()},
            {name: start.rebased(before, now) for name, start in self.starts.items()},
        )


@dataclass(frozen=True)
class Decision:
    """targets: unit -> replicas; a unit without a decision is left out, and keeps what it has.

    changes: the targets that differ from the counts' own. state: for the next call.
    held_back: what loads ask for and bounds, budget or back-offs deny, and whose load is unknown; one sentence each.
    given_up: the units whose starts have just been given up.
    """

    targets: Mapping[str, int]
    changes: tuple[Change, ...] = ()
    state: PolicyState = field(default_factory=PolicyState)
    held_back: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()


def decide(signals: Signals, spec: PolicySpec, fleet: Fleet, state: PolicyState, now: float) -> Decision:
    """What should be asked for now.

    spec: with the schedules of this moment applied (`schedule.in_force`). now: seconds, any origin, may jump.
    """
    now, state = state.at(now)
    listed = scalables(signals, spec, fleet)
    router = signals.router if signals.router is not None and is_usable_router(signals.router) else None

    starts = startup.watch(listed, state.starts, now)
    forecaster = Forecaster(spec.forecast, spec.signals.window_s, now)
    watched = measure(listed, router, state.watched, spec.forecast, forecaster, now)
    latency = _Latency(router, spec)

    ledger = Ledger(listed, spec, fleet.fixed)
    limits.keep_floors(listed, ledger)
    limits.keep_maxima(listed, ledger)
    limits.keep_budget(listed, ledger)

    up, down = _Timer(state.up_since, now), _Timer(state.down_since, now)
    growth = Growth(ledger, spec.forecast.horizon_s)
    for each in listed:
        _wish(each, growth, up)
    slo_at = _latency_steps(listed, growth, latency, spec, state.slo_at, now)
    for each in listed:
        _step_down(each, ledger, latency, down)
    growth.share_out()
    for wish in growth.granted:
        up.restart(wish.each.name)
    preempted_at = growth.preempt(listed, state.preempted_at, now)

    if slo_at == now and not any(wish.kind is Kind.SLO for wish in growth.granted):
        slo_at = state.slo_at
    remembered = PolicyState(now, watched, starts, up.since, down.since, slo_at, preempted_at)
    return _decision(listed, remembered, (*growth.held_back, *_unknown(listed)), startup.given_up(starts, state.starts))


def _unknown(listed: list[Scalable]) -> list[str]:
    """Whose load nobody knows, told because nothing else shows that nothing is decided for them."""
    missing = [each.name for each in listed if each.group is not None and each.load is None]
    return [f"{name}: no decision by load, its signals are missing or stale" for name in missing]


class _Timer:
    """Since when each name's condition has held without a break. Only names that are asked about are kept."""

    def __init__(self, last: Mapping[str, float], now: float) -> None:
        self._last = last
        self._now = now
        self.since: dict[str, float] = {}

    def held(self, name: str, seconds: float) -> bool:
        """The condition holds now; has it for so long?"""
        since = self.since[name] = self._last.get(name, self._now)
        return self._now - since >= seconds

    def restart(self, name: str) -> None:
        """The condition was acted upon: the next step waits as long."""
        if name in self.since:
            self.since[name] = self._now


class _Latency:
    """What the routers promise and what they keep. Percentiles that are no numbers break no promise."""

    def __init__(self, router: RouterLoad | None, spec: PolicySpec) -> None:
        self.router = router
        self.tpot_slo_ms = spec.slo.tpot_p95_ms
        self.tpot_ms = _measured(None if router is None else router.tpot_p95_ms)
        self.ttft_ms = _measured(None if router is None else router.ttft_p95_ms)
        self.slow_tokens = self.tpot_slo_ms is not None and self.tpot_ms > self.tpot_slo_ms
        self.slow_starts = spec.slo.ttft_p95_ms is not None and self.ttft_ms > spec.slo.ttft_p95_ms
        self.ttft_slo_ms = spec.slo.ttft_p95_ms

    @property
    def violated(self) -> bool:
        """While it is, nothing shrinks for want of load."""
        return self.slow_tokens or self.slow_starts

    def would_break(self, loss: float, slack: float) -> bool:
        """Whether a step that is longer by the share `loss` would bring tokens near the promise again."""
        slo = self.tpot_slo_ms
        return slo is not None and loss >= NOTICEABLE and self.tpot_ms * (1 + loss) > slo * slack


def _measured(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _wish(each: Scalable, growth: Growth, up: _Timer) -> None:
    """Ask for what the minimum and the load want: by the minimum at once, by the load once its delay has passed."""
    missing, step = each.minimum - each.total, min(MOST_AT_ONCE, each.scaling.upscale.max_step)
    if missing > 0:
        why = f"at least {each.minimum} wanted"
        growth.wish(Wish(each, Kind.MINIMUM, why, min(step, missing), math.inf))
        return
    if each.need is None or each.need.up <= each.capacity * (1 + ROUNDING):
        return
    if not up.held(each.name, each.scaling.upscale.after_s):
        return
    why = reasons.growth(each, each.capacity, growth.horizon_s)
    if each.total >= each.maximum:
        growth.deny(each, why, f"max_replicas: {each.maximum}")
        return
    kind = Kind.ROUTERS if each.group is None else Kind.NEED
    growth.wish(Wish(each, kind, why, min(step, each.maximum - each.total), each.need.up))


def _latency_steps(
    listed: list[Scalable], growth: Growth, latency: _Latency, spec: PolicySpec, last_at: float | None, now: float
) -> float | None:
    """Ask for one replica more where latency is too long. -> when such a step was last tried.

    Slow first tokens while requests wait: a router, if routers have more requests than they should. Else, and for slow
    tokens: the group whose next replica shortens the step most.
    """
    pause_s = max(SHORTEST_PAUSE_S, spec.forecast.horizon_s)
    router = latency.router
    if router is None or not latency.violated or (last_at is not None and now - last_at < pause_s):
        return last_at
    starving = latency.slow_starts and router.waiting > 0
    if latency.slow_tokens:
        what = f"a token takes {latency.tpot_ms:.0f} ms (promised: {latency.tpot_slo_ms:g} ms)"
    elif starving:
        what = f"the first token takes {latency.ttft_ms:.0f} ms (promised: {latency.ttft_slo_ms:g} ms)"
    else:
        return last_at
    if starving and (routers := next((each for each in listed if _are_full_routers(each, router)), None)) is not None:
        why = f"the first token takes {latency.ttft_ms:.0f} ms (promised: {latency.ttft_slo_ms:g} ms), requests wait"
        return now if growth.wish(Wish(routers, Kind.SLO, why, 1, math.inf)) else last_at
    gains = [(growth.next_gain(each), each) for each in listed if each.group is not None and each.total < each.maximum]
    saved, best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
    if best is None or saved < WORTHWHILE:
        return last_at
    why = f"{what}, one replica more saves {reasons.percent(saved)} of the step time"
    return now if growth.wish(Wish(best, Kind.SLO, why, 1, math.inf)) else last_at


def _are_full_routers(each: Scalable, router: RouterLoad) -> bool:
    """Routers that have more than they should, of which none is starting, and that may become more."""
    if each.group is not None or not isinstance(each.scaling, RouterScaling) or each.total >= each.maximum:
        return False
    ready = sum(unit.ready for unit in each.units)
    return each.total <= ready and router.running + router.waiting > each.scaling.target_ongoing_requests * ready


def _step_down(each: Scalable, ledger: Ledger, latency: _Latency, down: _Timer) -> None:
    """Take away what the load has not needed for the delay, unless latency is too long, or would be."""
    downscale = each.scaling.downscale
    for step in range(min(MOST_AT_ONCE, downscale.max_step)):
        unit = each.fits_less()
        if unit is None or each.need is None or any(one.target != one.before for one in each.units if step == 0):
            return
        if step == 0 and not down.held(each.name, downscale.after_s):
            return
        loss = -gain(each.need, each.ready_capacity, each.capacity, each.capacity - unit.speed)
        if latency.violated or latency.would_break(loss, 1 - each.scaling.hysteresis):
            return
        ledger.shrink(unit)
        unit.because(Reason.FIT, f"{reasons.fit(each, each.total)} for {downscale.after_s:g} s")
        down.restart(each.name)


def _decision(
    listed: list[Scalable], state: PolicyState, held_back: tuple[str, ...], given_up: tuple[str, ...]
) -> Decision:
    """The planned targets as a decision: of everything whose load is known, and of what changes in any case."""
    targets: dict[str, int] = {}
    changes = []
    for each in listed:
        for unit in each.units:
            name, before, after = unit.facts.name, unit.before, unit.target
            if not unit.floor <= after <= unit.ceiling or (each.need is None and after == before):
                continue
            targets[name] = after
            if after != before:
                reason = f"{name}: {unit.why}, {before} -> {after}"
                assert unit.reason is not None  # who plans a change says why
                changes.append(Change(name, each.group, unit.facts.pool, before, after, reason, unit.reason))
    return Decision(targets, tuple(changes), state, held_back, given_up)

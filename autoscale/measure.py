"""From the loads of this moment and before to what every group and the routers need: smoothed, and foreseen. Pure.

What belongs to a number of replicas is forgotten when the group's ready replicas change: shares of the time before
would be read as shares of today's replicas. Needs are capacities and do not depend on it, in theory; in a closed loop a
load answers to more replicas by offering more, which is no trend either, so the trend is forgotten, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from autoscale import needs
from autoscale.forecast import Forecaster, Trend
from autoscale.needs import Need, Rivals, Shares, Waits
from autoscale.pools import Scalable
from autoscale.signals import RouterLoad
from autoscale.spec import ForecastSpec, RouterScaling, ScalingSpec


class Watched(NamedTuple):
    """What is remembered of a group or of the routers. demand, shares: smoothed. ready: replicas of each unit."""

    ready: tuple[int, ...]
    at: float
    demand: float
    shares: Shares | None = None
    trend: Trend | None = None

    def rebased(self, now: float) -> Watched:
        """After the clock jumped back: the levels stay, the trend goes."""
        return self._replace(at=now, trend=None)


def measure(
    listed: list[Scalable],
    router: RouterLoad | None,
    last: Mapping[str, Watched],
    spec: ForecastSpec,
    forecaster: Forecaster,
    now: float,
) -> dict[str, Watched]:
    """Set the `need` of everything whose load is known. -> what to remember, also of those whose load is missing."""
    watched: dict[str, Watched] = {}
    for each in listed:
        before = last.get(each.name)
        if each.group is None:
            if router is not None and needs.is_usable_router(router):
                watched[each.name] = _watch_router(each, router, before, forecaster, now)
            elif before is not None:
                watched[each.name] = before
            continue
        if each.load is None:
            if before is not None:
                watched[each.name] = before
            continue
        watched[each.name] = _watch_group(each, before, spec, forecaster, now)
    waits = _waits([each for each in listed if each.group is not None], watched)
    for each in listed:
        if each.load is not None:
            watched[each.name] = _set_need(each, watched[each.name], waits, forecaster)
    return watched


def _watch_group(
    each: Scalable, before: Watched | None, spec: ForecastSpec, forecaster: Forecaster, now: float
) -> Watched:
    assert each.load is not None
    ready = tuple([unit.ready for unit in each.units])
    demand = needs.demand(each.load, each.ready_capacity, each.speed_known, spec.horizon_s)
    shares = needs.raw_shares(each.load)
    if before is None or before.ready != ready or needs.is_idle(each.load):
        return Watched(ready, now, demand, shares)
    weight = forecaster.weights(before.at)[0]
    old = before.shares
    if shares is not None and old is not None:
        shares = Shares(
            old.wait + weight * (shares.wait - old.wait),
            old.alone + weight * (shares.alone - old.alone),
            old.service + weight * (shares.service - old.service),
        )
    return Watched(ready, now, before.demand + weight * (demand - before.demand), shares, before.trend)


def _waits(groups: list[Scalable], watched: Mapping[str, Watched]) -> Waits:
    known, critical = [], set()
    for each in groups:
        shares = watched[each.name].shares if each.name in watched else None
        if shares is None:
            continue
        known.append(shares.wait)
        if shares.alone > needs.allowed_alone(shares.alone, _critical_target(each)):
            critical.add(each.name)
    # A group that no step waited for hides nobody.
    complete = all(each.name in watched for each in groups)
    return Waits(known + [0.0] * (len(groups) - len(known)), complete, critical)


def _set_need(each: Scalable, seen: Watched, waits: Waits, forecaster: Forecaster) -> Watched:
    assert each.load is not None
    assert isinstance(each.scaling, ScalingSpec)
    scaling = each.scaling
    slack = 1 - scaling.hysteresis
    if needs.is_idle(each.load):
        each.need = Need(0.0, 0.0)
        return seen._replace(trend=None)
    up = seen.demand / scaling.target_utilization
    down = up / slack
    critical, rivals = False, Rivals()
    if seen.shares is not None:
        rivals = waits.rivals(each.name, seen.shares.wait)
        capacity, target = each.ready_capacity, scaling.target_critical_share
        by_path = capacity * needs.critical_ratio(seen.shares, rivals, target, target, growing=True)
        cover = target * (2 - slack)
        down = max(down, capacity * needs.critical_ratio(seen.shares, rivals, target * slack, cover, growing=False))
        critical, up = by_path > up, max(by_path, up)
    up, down = min(needs.MOST, up), min(needs.MOST, max(up, down))
    trend = forecaster.follow(seen.trend, up)
    rise = forecaster.rise(trend)
    each.need = Need(up + rise, down + rise, critical, rise, seen.shares, rivals, seen.demand)
    return seen._replace(trend=trend)


def _watch_router(
    each: Scalable, router: RouterLoad, before: Watched | None, forecaster: Forecaster, now: float
) -> Watched:
    assert isinstance(each.scaling, RouterScaling)
    requests = router.running + router.waiting
    if before is not None:
        requests = before.demand + forecaster.weights(before.at)[0] * (requests - before.demand)
    trend = forecaster.follow(None if before is None else before.trend, requests)
    rise = forecaster.rise(trend)
    ready = each.units[0].ready
    need = needs.router_need(router, requests + rise, each.scaling.target_ongoing_requests, _slack(each), ready)
    each.need = need._replace(expected=rise, demand=requests)
    return Watched((ready,), now, requests, None, trend)


def _critical_target(each: Scalable) -> float:
    assert isinstance(each.scaling, ScalingSpec)
    return each.scaling.target_critical_share


def _slack(each: Scalable) -> float:
    return 1 - each.scaling.hysteresis

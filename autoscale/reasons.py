"""Why, in words that a person understands: what follows "experts-0: " and precedes "2 -> 3". Pure."""

from __future__ import annotations

from autoscale.pools import Scalable
from autoscale.spec import RouterScaling


def growth(each: Scalable, capacity: float, horizon_s: float) -> str:
    """Why the load needs more than `capacity`, that which was planned before."""
    need, scaling, load = each.need, each.scaling, each.load
    assert need is not None
    later = f", and more in {horizon_s:g} s" if need.expected > 0.01 * need.up else ""
    if isinstance(scaling, RouterScaling):
        each_has = number(scaling.target_ongoing_requests)
        return f"{number(need.demand)} requests run or wait{later}, a router should have {each_has}"
    if need.critical and need.shares is not None:
        target = f"(target {percent(scaling.target_critical_share)})"
        if need.shares.alone > scaling.target_critical_share:
            return f"routers wait {percent(need.shares.alone)} of their step time for it alone {target}{later}"
        share = percent(max(0.0, need.shares.wait - need.rivals.typical))
        return f"routers wait {share} of their step time longer for it than for most groups {target}{later}"
    if load is not None and each.speed_known:
        came = load.offered_rows_per_s
        to_come = need.demand - came
        coming = f" and {number(to_come)} to come" if to_come > 0.05 * need.demand else ""
        at = f"{number(capacity * scaling.target_utilization)} rows/s capacity at {percent(scaling.target_utilization)}"
        return f"{number(came)} rows/s offered{coming}{later}, {at}"
    busy = 0.0 if load is None else load.utilization
    return f"replicas are busy {percent(busy)} of the time (target {percent(scaling.target_utilization)}){later}"


def fit(each: Scalable, replicas: int) -> str:
    """That the load fits so many replicas."""
    them = "1 replica" if replicas == 1 else f"{replicas} replicas"
    if each.group is None:
        requests = 0.0 if each.need is None else each.need.demand
        return f"{number(requests)} requests fit {them}"
    if each.load is not None and each.speed_known:
        return f"{number(each.load.offered_rows_per_s)} rows/s offered fit {them}"
    return f"the load fits {them}"


def percent(share: float) -> str:
    """0.654 -> "65 %"."""
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """With two digits at least, and no more than are worth reading: 412, 3.1, 0.25."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"

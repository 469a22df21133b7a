"""How much capacity a group needs, in rows per second, and how many routers: two reasons, the larger wins. Pure.

Utilisation. Replicas should be busy for `target_utilization` of the time: capacity = demand / target, where demand is
what routers offer, what prompts will add once they decode (coming) and, only where replicas are saturated, what already
queues, to be worked off within the horizon. A closed-loop load never shows more than the capacity there is: at 100 %
busy and a target of 65 % the need is 1.54 times today's capacity and grows again by that factor once the new replicas
are ready, so 1 -> 2 -> 4 -> 7. The backlog, which a saturated system does show, makes larger steps.

Critical path. S: share of the step time from a scatter to the group's last row. W: the part of it in which all other
groups had answered. V: the part of S that more capacity shortens (the rest is the hop). With capacity c' instead of c
the group is waited for w(c') = S - V + V c / c', and the step takes T' = 1 - W + W' of its time, W' being the new wait
alone. The need is the smallest c' for which W' / T' <= t, that is W' <= a := t (1 - W) / (1 - t):

    W > a   growing: W' = w - (S - W), hence                      w <= S - W + a
    W <= a  shrinking: more of the wait is alone, at least in proportion, and all of it beyond the others:
                                                                  w <= min(S a / W, others + a)
    worked  S = V = 0.6, W = 0.4, t = 0.15, one replica:  a = 0.106, w <= 0.306, c' = 0.6 / 0.306 = 1.96 -> 2 replicas
            as predicted for those 2: S = 0.3 / 0.7 = 0.429, W = 0.143:  c' = 1.96 again. It stays.

Groups that are slow together hide each other: each is waited for alone ~ 0 of the time. So "others" is not the slowest
other group but the typical one (the median from above), unless a slower one covers this group by more than t; and a
group over that line needs more even if its own W is small. That joint rule waits while some group is critical alone:
the slowest grows first. If more than half of the groups are equally slow the load is balanced, none of them is hot, and
only utilisation counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from autoscale.signals import GroupLoad, RouterLoad

MOST = 1e15
"""A signal above is as absurd as a negative one."""
SATURATED = 0.9
"""Busy share from which offered rows say little about the demand, and queued rows are counted."""
MOST_ALONE = 0.99
TINY = 1e-12
KV_FULL = 0.9
SHORTEST_HORIZON_S = 1.0


class Shares(NamedTuple):
    """Smoothed, between 0 and 1: S, W and V of the module docstring; W <= S, V <= S."""

    wait: float
    alone: float
    service: float


class Rivals(NamedTuple):
    """What other groups make of one group's wait. typical: the median wait of the others, from above.

    hottest: the longest wait of the others. joint: whether the joint rule may make the group grow.
    """

    typical: float = 0.0
    hottest: float = 0.0
    joint: bool = False


class Need(NamedTuple):
    """Capacity. up: below it the group should grow. down: it may shrink to no less, by targets tightened.

    critical: the critical path, not utilisation, is the reason for `up`. expected: what the forecast added to both.
    """

    up: float
    down: float
    critical: bool = False
    expected: float = 0.0
    shares: Shares | None = None
    rivals: Rivals = Rivals()
    demand: float = 0.0


def is_usable(load: GroupLoad) -> bool:
    """Whether every number is finite and not negative; a load with one that is not counts as missing."""
    return (
        0 <= load.offered_rows_per_s <= MOST
        and 0 <= load.coming_rows_per_s <= MOST
        and 0 <= load.utilization <= MOST
        and 0 <= load.queue_rows <= MOST
        and (load.wait_share is None or 0 <= load.wait_share <= MOST)
        and (load.critical_share is None or 0 <= load.critical_share <= MOST)
        and (load.service_share is None or 0 <= load.service_share <= MOST)
        and all(0 <= speed <= MOST for speed in load.speed_rows_per_s.values())
    )


def is_usable_router(load: RouterLoad) -> bool:
    """As `is_usable`; percentiles that are no numbers are judged where they are used."""
    return 0 <= load.running <= MOST and 0 <= load.waiting <= MOST and 0 <= load.kv_used_share <= MOST


def is_idle(load: GroupLoad) -> bool:
    """No step ran and nothing is offered: the need is the minimum."""
    return load.wait_share is None and load.offered_rows_per_s == 0 and load.coming_rows_per_s == 0


def demand(load: GroupLoad, ready_capacity: float, speed_known: bool, horizon_s: float) -> float:
    """Rows per second that want to be computed; in busy replicas where no speed is known."""
    rows = load.offered_rows_per_s + load.coming_rows_per_s
    if load.utilization >= SATURATED:
        rows += load.queue_rows / max(horizon_s, SHORTEST_HORIZON_S)
    if speed_known:
        return rows
    busy = min(1.0, load.utilization) * ready_capacity
    return busy * rows / load.offered_rows_per_s if load.offered_rows_per_s > 0 else busy


def raw_shares(load: GroupLoad) -> Shares | None:
    """The shares as reported, made consistent; None where no step ran or the critical path is unknown."""
    if load.wait_share is None or load.critical_share is None:
        return None
    wait = min(1.0, load.wait_share)
    return Shares(
        wait,
        min(wait, load.critical_share),
        wait if load.service_share is None else min(wait, load.service_share),
    )


class Waits:
    """The waits of all groups, to tell each one its rivals.

    waits: of each group whose wait is known. complete: those are all groups; else a group may be hidden by one nobody
    knows, and only what was measured counts.
    """

    def __init__(self, waits: Iterable[float], complete: bool, critical: set[str]) -> None:
        self._sorted = [*sorted(waits, reverse=True), 0.0]
        self._half = (len(self._sorted) - 1) // 2
        self._complete = complete
        self._critical = critical

    def rivals(self, group: str, wait: float) -> Rivals:
        """What the others are for `group`, whose own wait is among those known."""
        ordered, half = self._sorted, self._half
        if len(ordered) <= 2:
            return Rivals()
        # With three groups or less the typical one is the slowest other one, and W says all there is to say.
        joint, half = half >= 2 and self._complete, max(1, half)
        typical = ordered[half] if wait >= ordered[half - 1] else ordered[half - 1]
        hottest = ordered[1] if wait >= ordered[0] else ordered[0]
        return Rivals(typical, hottest, joint and not self._critical - {group})


def allowed_alone(alone: float, target: float) -> float:
    """`a` of the module docstring: the wait alone that makes a share of `target`."""
    return target * (1 - min(MOST_ALONE, alone)) / (1 - target)


def critical_ratio(shares: Shares, rivals: Rivals, target: float, cover: float, growing: bool) -> float:
    """c' / c of the module docstring; 0 where the wait does not depend on the capacity.

    target: the critical share aimed at, below 1. cover: by how much a slower group must be slower to hide this one.
    growing: whether more than c counts; if not, the joint rule holds in any case.
    """
    wait, alone, service = shares
    allowed = allowed_alone(alone, target)
    fixed = wait - service
    if alone > allowed:
        longest = wait - alone + allowed
    else:
        longest = wait * allowed / alone if alone > 0 else math.inf
        line = max(rivals.typical + allowed, rivals.hottest - cover)
        longest = min(longest, line if rivals.joint or not growing else max(line, wait))
    # The hop is a rival, too: no capacity makes a group answer faster than that.
    return service / max(longest - fixed, allowed, TINY)


def gain(need: Need, ready: float, planned: float, capacity: float) -> float:
    """By which share of today's step the step is shorter with `capacity` than with `planned`; negative if longer.

    ready: the capacity that today's shares belong to.
    """
    if need.shares is None or ready <= 0:
        return 0.0
    return _alone(need, ready, planned) - _alone(need, ready, capacity)


def _alone(need: Need, ready: float, capacity: float) -> float:
    """The predicted wait alone, W'."""
    wait, alone, service = need.shares or Shares(0.0, 0.0, 0.0)
    if capacity <= 0:
        return MOST
    new = wait - service + min(MOST, service * ready / capacity)
    if new <= wait:
        return max(0.0, new - (wait - alone))
    return max(alone * new / wait if wait > 0 else 0.0, new - max(wait - alone, need.rivals.hottest))


def router_need(load: RouterLoad, requests: float, target: float, slack: float, ready: int) -> Need:
    """Routers for so many requests, running and waiting; one more where a full KV cache keeps some waiting.

    target: requests a router should have. slack: how far below that they must stay after a step down, at most 1.
    """
    up, down = requests / target, requests / target / slack
    if load.kv_used_share > KV_FULL and load.waiting > 0:
        up, down = max(up, ready + 1.0), max(down, ready + 1.0)
    return Need(min(MOST, up), min(MOST, down), demand=requests)

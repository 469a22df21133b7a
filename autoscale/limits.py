"""What holds without any load: Serve's own bounds, maxima that an edit lowered, a budget that is exceeded. Pure."""

from __future__ import annotations

import heapq

from autoscale.budget import ROUNDING, Ledger
from autoscale.needs import gain
from autoscale.pools import Scalable, Unit
from autoscale.signals import Reason


def keep_floors(listed: list[Scalable], ledger: Ledger) -> None:
    """A group keeps one replica at home, as Serve does, if the budget has it."""
    for each in listed:
        for unit in each.units:
            if unit.target < unit.floor and ledger.grow(unit):
                unit.because(Reason.MINIMUM, "one replica always stays")


def keep_maxima(listed: list[Scalable], ledger: Ledger) -> None:
    """Replicas above a maximum go at once."""
    for each in listed:
        for unit in each.units:
            if unit.target > unit.ceiling:
                ledger.shrink(unit, unit.target - unit.ceiling)
                unit.because(Reason.MAXIMUM, f"at most {unit.ceiling} are possible")
        excess = each.total - each.maximum
        while excess > 0 and (least := each.to_shrink()) is not None:
            cut = min(excess, least.target - least.floor)
            ledger.shrink(least, cut)
            least.because(Reason.MAXIMUM, f"at most {each.maximum} allowed")
            excess -= cut


def keep_budget(listed: list[Scalable], ledger: Ledger) -> None:
    """While the budget holds less than is asked for, the least useful replicas go: no delay, but a step each time."""
    accounts = ledger.overdrawn(listed)
    if not accounts:
        return
    queue = [
        (_usefulness(each, unit), number, each, unit, 0)
        for number, (each, unit) in enumerate((each, unit) for each in listed for unit in each.units)
    ]
    heapq.heapify(queue)
    taken = dict.fromkeys((each.name for each in listed), 0)
    while queue and accounts:
        _, number, each, unit, seen = heapq.heappop(queue)
        if each.total <= each.minimum or taken[each.name] >= each.scaling.downscale.max_step:
            continue
        if unit.target <= unit.floor or not ledger.eases(unit, accounts):
            continue
        if seen < taken[each.name]:
            heapq.heappush(queue, (_usefulness(each, unit), number, each, unit, taken[each.name]))
            continue
        unit.because(Reason.BUDGET, f"more is asked for than there is ({ledger.describe(accounts)})")
        ledger.shrink(unit)
        taken[each.name] += 1
        heapq.heappush(queue, (_usefulness(each, unit), number, each, unit, taken[each.name]))
        for account, amount in ledger.uses(unit):
            if account in accounts:
                accounts[account] -= amount
        accounts = {account: amount for account, amount in accounts.items() if amount > ROUNDING}


def _usefulness(each: Scalable, unit: Unit) -> tuple[bool, bool, bool, float, float, str]:
    """What goes first is smallest: what the load does not need, then what costs the step least. Routers go last."""
    if each.need is None:
        return each.group is None, True, True, 0.0, 0.0, unit.facts.name
    capacity = each.capacity
    loss = -gain(each.need, each.ready_capacity, capacity, capacity - unit.speed) / unit.cost
    pressure = each.need.up / capacity if capacity > 0 else 0.0
    return each.group is None, False, not each.fits_without(unit), loss, pressure, unit.facts.name

"""What may still be held: the budget of the policy file and the bounds of pools, as one account per resource. Pure.

Everything counts that holds a device now or will: ready, starting, and leaving until it is gone. What a decision takes
back is therefore free only in a later one.

    resource   who uses it                        how much of it
    gpus       routers and expert replicas        `num_gpus` of one replica
    cpus       routers and expert replicas        `num_cpus` of one replica
    replicas   expert replicas                    1
    pool       expert replicas of that pool       1, bounded by the pool's own `max_replicas`

A budget given as pool -> number bounds the pools it names, and no other; one that the cluster gives (`cluster_budget`)
bounds all pools together and each that its machines can run. Replicas whose number the configuration fixes
hold their part of it before anything is decided.
"""

from __future__ import annotations

from collections.abc import Iterable

from autoscale.pools import Scalable, Unit, units_of
from autoscale.signals import UnitFacts
from autoscale.spec import Account, PolicySpec

ROUNDING = 1e-6
"""Amounts are sums of fractions such as 0.1."""


class Ledger:
    """The accounts while one decision is made. Growth is booked by `grow`, which never overdraws an account."""

    def __init__(self, listed: list[Scalable], spec: PolicySpec, fixed: Iterable[tuple[UnitFacts, int]] = ()) -> None:
        """fixed: (unit, replicas) that hold their part whatever is decided."""
        self._stated = _limits(spec)
        self._limits = dict(self._stated)
        for facts, count in fixed:
            for account, amount in _amounts(facts):
                if account in self._limits:
                    self._limits[account] -= count * amount
        self._facts: dict[str, list[tuple[Account, float]]] = {}
        self._free = dict(self._limits)
        self._coming = dict.fromkeys(self._limits, 0.0)
        if not self._limits:
            return
        for unit in units_of(listed):
            for account, amount in self.uses(unit):
                self._free[account] -= unit.held * amount
                self._coming[account] += (unit.held - max(unit.ready, unit.target)) * amount

    def uses(self, unit: Unit) -> list[tuple[Account, float]]:
        """(account, amount) of one replica, for the accounts that are bounded."""
        if not self._limits:
            return []
        found = self._facts.get(unit.facts.name)
        if found is None:
            found = [(account, amount) for account, amount in _amounts(unit.facts) if account in self._limits]
            self._facts[unit.facts.name] = found
        return found

    def has_room(self, unit: Unit) -> bool:
        """Whether one more replica fits. One that was taken back in this decision still has its room."""
        return unit.target < max(unit.ready, unit.before) or all(
            amount <= self._free[account] + ROUNDING for account, amount in self.uses(unit)
        )

    def grow(self, unit: Unit) -> bool:
        """One more replica of `unit`, if there is room."""
        if not self.has_room(unit):
            return False
        held = unit.held
        unit.target += 1
        if unit.held > held:
            for account, amount in self.uses(unit):
                self._free[account] -= amount
        return True

    def shrink(self, unit: Unit, replicas: int = 1) -> None:
        """So many less: their room is free once they are gone."""
        unit.target -= replicas
        for account, amount in self.uses(unit):
            self._coming[account] += replicas * amount

    def lacking(self, unit: Unit) -> list[Account]:
        """The accounts in which one more replica does not fit."""
        return [account for account, amount in self.uses(unit) if amount > self._free[account] + ROUNDING]

    def comes(self, unit: Unit) -> bool:
        """Whether one more replica will fit once everything is gone that is leaving."""
        return all(
            amount <= self._free[account] + self._coming[account] + ROUNDING for account, amount in self.uses(unit)
        )

    def expects(self, unit: Unit) -> None:
        """Keep what is leaving for one more replica of `unit`, so that nobody else counts on it in this decision."""
        for account, amount in self.uses(unit):
            self._coming[account] -= amount

    def frees(self, unit: Unit, accounts: list[Account]) -> bool:
        """Whether one replica less of `unit` gives something to each of the accounts."""
        used = {account for account, amount in self.uses(unit) if amount > 0}
        return used.issuperset(accounts)

    def eases(self, unit: Unit, accounts: Iterable[Account]) -> bool:
        """Whether one replica less of `unit` gives something to any of the accounts."""
        return any(account in accounts and amount > 0 for account, amount in self.uses(unit))

    def overdrawn(self, listed: list[Scalable]) -> dict[Account, float]:
        """By how much accounts do not even fit the planned targets, whatever is leaving."""
        wanted = dict.fromkeys(self._limits, 0.0)
        for unit in units_of(listed):
            for account, amount in self.uses(unit):
                wanted[account] += unit.target * amount
        excess = {account: wanted[account] - limit for account, limit in self._limits.items()}
        return {account: amount for account, amount in excess.items() if amount > ROUNDING}

    def describe(self, accounts: Iterable[Account]) -> str:
        """As a reason says it: "budget: 8 replicas, all held"."""
        parts = []
        for resource, pool in accounts:
            limit = self._stated[(resource, pool)]
            if resource == "pool":
                parts.append(f"pool {pool}: {limit:g} replicas, all held")
            else:
                where = "" if pool is None else f" in pool {pool}"
                parts.append(f"budget: {limit:g} {resource}{where}, all held")
        return "; ".join(parts)


def _amounts(facts: UnitFacts) -> list[tuple[Account, float]]:
    """What one replica takes of everything that can be bounded."""
    uses: list[tuple[Account, float]] = []
    for resource, amount in (("gpus", facts.gpus), ("cpus", facts.cpus)):
        if amount > 0:
            uses += [((resource, None), amount), ((resource, facts.pool), amount)]
    if facts.group is not None:
        uses += [(("replicas", None), 1.0), (("replicas", facts.pool), 1.0), (("pool", facts.pool), 1.0)]
    return uses


def _limits(spec: PolicySpec) -> dict[Account, float]:
    limits = spec.budget.limits
    for pool, policy in spec.pools.items():
        if policy.max_replicas is not None:
            limits[("pool", pool)] = float(policy.max_replicas)
    return limits

"""The cluster under a policy, tick by tick: its budget in numbers, machines before its peaks, and what to tell of both.

Holds the link to the cluster while the policy in force wants something of it, or something is still to be let go; knows
no Serve. Where the policy wants nothing, nothing is made and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol

from autoscale.capacity_spec import KubernetesSpec
from autoscale.cluster_budget import Given, budget_of
from autoscale.cluster_link import ENDED, ClusterLink, Wanted
from autoscale.measure import Watched
from autoscale.prewarming import Outlook
from autoscale.signals import Fleet, Signals
from autoscale.spec import Account, PolicySpec
from cluster.nodes.keeper import Prewarm

LOOK_S = 2.0
"""How often it is looked ahead: schedules are searched, and machines take minutes."""


class Link(Protocol):
    """As `ClusterLink`."""

    @property
    def latest(self) -> Given | None: ...

    def want(self, wanted: Wanted) -> None: ...


class ClusterSide:
    """notes: sentences on the budget, of the last tick."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self._link: Link | None = None
        self._leaving: list[Link] = []
        self._asked: KubernetesSpec | None = None
        self._outlook = Outlook()
        self._looked_at = float("-inf")
        self._amounts: Mapping[Account, float] | None = {}
        self._budgeted: tuple[PolicySpec, Mapping[Account, float], PolicySpec] | None = None

    def follow(self, spec: PolicySpec) -> None:
        """The policy file in force: make or drop the link, as it wants one.

        A link to a place that the file names no more stays until what it has raised there is let go: beside the new
        one, where there is one, as it may never come to that.
        """
        self._leaving = [link for link in self._leaving if not _is_done(link.latest)]
        if spec.budget.asks or spec.prewarm is not None:
            if self._link is not None and self._asked != spec.kubernetes:
                self._link.want(Wanted(prewarm=ENDED))
                self._leaving.append(self._link)
                self._link = None
            if self._link is None:
                self._link, self._asked = ClusterLink(spec.kubernetes), spec.kubernetes
                self._link.want(_wanted(spec, None))
                self._looked_at = float("-inf")
        elif self._link is not None and (given := self._link.latest) is not None and given.ended:
            self._link = None
        if self._link is not None and spec.prewarm is None:
            # The policy does not pre-warm, or not any more: what is raised goes back to what was found.
            self._link.want(_wanted(spec, ENDED))

    def budgeted(self, spec: PolicySpec, fleet: Fleet, now: float) -> PolicySpec | None:
        """`spec` with numbers for what it leaves to the cluster; None where they are not known, so nothing is decided.

        The same object as long as nothing changes.
        """
        found = budget_of(spec, fleet, None if self._link is None else self._link.latest, now)
        self.notes, self._amounts = found.notes, found.amounts
        if found.amounts is None or not spec.budget.asks:
            return None if found.amounts is None else spec
        last = self._budgeted
        if last is None or last[0] is not spec or last[1] != found.amounts:
            self._budgeted = last = (spec, found.amounts, _in_numbers(spec, found.amounts))
        return last[2]

    def prewarm(
        self,
        file: PolicySpec,
        fleet: Fleet,
        signals: Signals,
        watched: Mapping[str, Watched],
        now: float,
        at: datetime,
    ) -> None:
        """Ask for the machines that the next peak takes. file: the policy as it was read. watched: as last decided."""
        if file.prewarm is None or self._link is None or self._amounts is None:
            return
        if 0 <= now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        seats = self._outlook.seats(_in_numbers(file, self._amounts), fleet, signals, watched, now, at)
        release = self._outlook.may_release(file, now)
        self._link.want(_wanted(file, Prewarm(seats, release, file.prewarm.worker_groups)))

    def report(self) -> dict[str, Any] | None:
        """For `/v1/cluster`; None where the cluster is not asked for anything."""
        if self._link is None:
            return None
        given = self._link.latest or Given("not known yet")
        read_at = None if given.read_at is None else round(given.read_at)
        troubles = list(given.troubles)
        for link in self._leaving:
            before = () if link.latest is None else link.latest.troubles
            troubles += [f"where the policy was before, machines are not let go yet: {trouble}" for trouble in before]
        return {"source": given.source, "read_at": read_at, **given.shown, "troubles": troubles}


def _is_done(given: Given | None) -> bool:
    """Whether nothing is left to be let go there: all is, or no worker group was ever read."""
    return given is not None and (given.ended or not given.shown.get("worker_groups"))


def _in_numbers(spec: PolicySpec, amounts: Mapping[Account, float]) -> PolicySpec:
    return spec.model_copy(update={"budget": spec.budget.given(amounts)}) if spec.budget.asks else spec


def _wanted(spec: PolicySpec, prewarm: Prewarm | None) -> Wanted:
    return Wanted(bool(spec.budget.asks), "nodes" in spec.budget.asks.values(), prewarm)

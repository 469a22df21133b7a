"""The policy as Serve calls it: contexts in, targets out, about nine times a second, inside the Serve controller.

Named in the application's config:

    autoscaling_policy:
      policy_function: autoscale.serve_policy:ServePolicy
      policy_kwargs: {policy_file: autoscale/policies/default.yaml}

One tick: reload the policy file where it has changed, take in reports (`observer`), count replicas (`leaving`), decide
(`policy`) within what the cluster gives (`cluster_side`), tell the Directory (`controller_link`). It never blocks and
never raises: an exception here would stop the update of every application of the controller. A deployment that is left
out of the answer keeps what it has.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from autoscale.cluster_side import ClusterSide
from autoscale.controller_link import ControllerLink, Details
from autoscale.fleet import fleet_of
from autoscale.leaving import Leaving
from autoscale.metering import PolicyMetering
from autoscale.observer import Observer
from autoscale.policy import Decision, PolicyState, decide
from autoscale.policy_file import PolicyFile, check_against, read
from autoscale.schedule import Schedule
from autoscale.signals import ROUTER, Fleet, Signals, UnitCounts
from autoscale.spec import PolicySpec
from autoscale.stalls import Stalls
from cluster.config import AppConfig, parse_args, resolve
from cluster.decisions import KEPT_DECISIONS, DecisionRecord, PolicyReport
from cluster.errors import ConfigError
from cluster.serve_logging import log_through_serve

logger = logging.getLogger(__name__)

DIRECTORY = "Directory"
PERIOD_S = 0.2
"""Decisions are made no more often: reports come every half second."""
BUDGET_WAIT_S = 20.0
"""What the cluster gives is read every 5 s, on Kubernetes every 15: from then on it is told that nobody knows it."""


class ServePolicy:
    """An application-level autoscaling policy of Serve. One instance per application, rebuilt with the controller.

    policy_file: the YAML file, relative paths against the project root.
    """

    def __init__(self, policy_file: str) -> None:
        log_through_serve()
        self._name = policy_file
        self._file: PolicyFile | None = None
        self._schedule: tuple[PolicySpec, Schedule] | None = None
        self._state = PolicyState()
        self._leaving = Leaving()
        self._records: deque[DecisionRecord] = deque(maxlen=KEPT_DECISIONS)
        self._held_back: tuple[str, ...] = ()
        self._link: ControllerLink | None = None
        self._details: Details | None = None
        self._fleet: Fleet | None = None
        self._observer: Observer | None = None
        self._cluster = ClusterSide()
        self._decided_at = float("-inf")
        self._complaint = ""
        self._metering = PolicyMetering()
        self._stalls = Stalls()
        self._stalled: tuple[str, ...] = ()
        self._unbudgeted_since: float | None = None
        self._no_budget: tuple[str, ...] = ()

    @classmethod
    def check(cls, kwargs: Mapping[str, Any], config: AppConfig) -> list[str]:
        """What is wrong with `policy_kwargs` for this configuration, one sentence each. Starts nothing."""
        name = kwargs.get("policy_file")
        if not isinstance(name, str) or len(kwargs) != 1:
            return [
                f"autoscaling_policy.policy_kwargs: {dict(kwargs)!r} is not allowed: give `policy_file` and no more."
            ]
        try:
            spec = read(resolve(name))
        except ConfigError as error:
            return [f"{name}: {line}" for line in str(error).splitlines()]
        return [f"{name}: {line}" for line in check_against(spec, fleet_of(config))]

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Serve's call: deployment id -> `AutoscalingContext` in, (deployment id -> replicas, no state of ours) out."""
        self._metering.asked()
        try:
            targets = self._tick(contexts, _now(), time.time())
            if targets is not None:
                self._complaint = ""
        except Exception as error:
            self._metering.failed()
            self._tell_failure(repr(error))
            if repr(error) != self._complaint:
                self._complaint = repr(error)
                logger.exception("the policy failed; all targets stay as they are")
            targets = {}
        targets = targets or {}
        return {key: targets[key.name] for key in contexts if key.name in targets}, {}

    def _tick(self, contexts: Mapping[Any, Any], now: float, wall_s: float) -> dict[str, int] | None:
        """Unit -> replicas; None where nothing was looked at. now: monotonic; wall_s: Unix, for schedules only."""
        if not contexts or 0 <= now - self._decided_at < PERIOD_S:
            return None
        self._decided_at = now
        if self._link is None:
            self._link = ControllerLink(next(iter(contexts)).app_name, DIRECTORY, self._metering.tell)
        self._take_details(self._link.latest)
        if self._file is None or self._fleet is None or self._observer is None:
            return None
        self._file.refresh()
        self._metering.file_is(self._file.error)
        scheduled = self._scheduled(self._file, wall_s)
        targets: dict[str, int] = {}
        if scheduled is not None:
            units = {key.name: context for key, context in contexts.items()}
            # Whether or not something can be decided: signals are watched, and what is wrong is told.
            signals = self._signals(self._observer, self._fleet, scheduled, units, now)
            spec = self._budgeted(scheduled, self._fleet, now)
            decision = Decision({}) if spec is None else decide(signals, spec, self._fleet, self._state, now)
            self._note(self._observer, self._fleet, scheduled, signals, decision, now)
            if spec is not None:
                self._remember(decision, now, wall_s)
            targets = dict(decision.targets)
            self._prewarm(self._file, signals, now, wall_s)
            moving = any(context.target_num_replicas != context.current_num_replicas for context in units.values())
            self._link.watch_closely(moving or bool(decision.changes) or self._leaving.any)
        self._link.report(self._report(self._file))
        return targets

    def _signals(
        self, observer: Observer, fleet: Fleet, spec: PolicySpec, units: Mapping[str, Any], now: float
    ) -> Signals:
        for name in {*fleet.units, ROUTER} & units.keys():
            observer.see(name, _reports(units[name]), now, spec.signals.window_s)
        counts = {name: self._counts(name, context) for name, context in units.items() if name in fleet.units}
        return observer.signals(counts, ROUTER, spec.signals, now)

    def _prewarm(self, file: PolicyFile, signals: Signals, now: float, wall_s: float) -> None:
        if file.spec is not None and self._fleet is not None:
            at = datetime.fromtimestamp(wall_s, UTC)
            self._cluster.prewarm(file.spec, self._fleet, signals, self._state.watched, now, at)

    def _note(
        self, observer: Observer, fleet: Fleet, spec: PolicySpec, signals: Signals, decision: Decision, now: float
    ) -> None:
        """What is told of a decision beside the decision."""
        ages = observer.ages(ROUTER, now)
        self._stalled = self._stalls.take(signals, ages, spec.signals.max_age_s, now)
        self._metering.decided(fleet, signals.counts, decision, ages)

    def _counts(self, name: str, context: Any) -> UnitCounts:
        # Running ones beyond the target are about to stop, whoever lowered it: they are no capacity, and hold devices.
        running, target = int(context.current_num_replicas), int(context.target_num_replicas)
        return UnitCounts(min(running, target), target, max(self._leaving.count(name), running - target))

    def _remember(self, decision: Decision, now: float, wall_s: float) -> None:
        self._state, self._held_back = decision.state, decision.held_back
        for change in decision.changes:
            logger.info("%s", change.reason)
            if change.after < change.before:
                self._leaving.taken_back(change.unit, change.before - change.after, now)
            group = change.group or ROUTER
            self._records.append(DecisionRecord(wall_s, group, change.pool, change.before, change.after, change.reason))

    def _take_details(self, details: Details | None) -> None:
        """Adopt what the controller said, where that is new. A changed configuration starts the observations afresh."""
        if details is None or details is self._details:
            return
        if self._details is None or details.args != self._details.args:
            self._fleet = fleet_of(parse_args(details.args))
            self._observer, self._stalls = Observer(self._fleet), Stalls()
            # Only now, because a policy can be judged only against the groups it is for.
            self._file = self._file or PolicyFile(resolve(self._name), clock=_now, check=self._misfits)
        self._details = details
        self._leaving.details(details.stopping, details.asked_at)

    def _scheduled(self, file: PolicyFile, wall_s: float) -> PolicySpec | None:
        """The policy in force with the schedules of this moment; None where there is none."""
        spec = file.spec
        if spec is None or self._fleet is None:
            return None
        self._cluster.follow(spec)
        if self._schedule is None or self._schedule[0] is not spec:
            self._schedule = (spec, Schedule(spec))
        return self._schedule[1].in_force(datetime.fromtimestamp(wall_s, UTC))

    def _budgeted(self, scheduled: PolicySpec, fleet: Fleet, now: float) -> PolicySpec | None:
        """The same with what the cluster gives; None for no decision."""
        budgeted = self._cluster.budgeted(scheduled, fleet, now)
        if budgeted is not None:
            self._unbudgeted_since = None
        else:
            self._held_back = ()
            self._unbudgeted_since = now if self._unbudgeted_since is None else min(now, self._unbudgeted_since)
        lasting = self._unbudgeted_since is not None and now - self._unbudgeted_since > BUDGET_WAIT_S
        self._no_budget = self._cluster.notes if lasting else ()
        return budgeted

    def _misfits(self, spec: PolicySpec) -> list[str]:
        """What a policy names that is not there."""
        return [] if self._fleet is None else list(check_against(spec, self._fleet))

    def _report(self, file: PolicyFile) -> PolicyReport:
        return PolicyReport(
            file=self._name,
            version=file.version_hash,
            loaded_at=file.loaded_at,
            error=file.error,
            held_back=(*self._cluster.notes, *self._held_back),
            decisions=tuple(self._records),
            cluster=self._cluster.report(),
            stalled=self._stalled,
            no_budget=self._no_budget,
        )

    def _tell_failure(self, failure: str) -> None:
        """Where even that fails, the Directory notices the silence, or Prometheus the count."""
        with suppress(Exception):
            if self._link is not None and self._file is not None:
                self._link.report(replace(self._report(self._file), failure=failure))


def _now() -> float:
    """Monotonic seconds: the one clock of a policy and its file."""
    return time.monotonic()


def _reports(context: Any) -> dict[str, dict[str, float]]:
    """The last report of every running replica of a deployment; {} for one that has not reported."""
    reports: dict[str, dict[str, float]] = {replica.unique_id: {} for replica in context.running_replicas}
    for metric, series in (context.raw_metrics or {}).items():
        for replica, points in series.items():
            if points and replica.unique_id in reports:
                reports[replica.unique_id][metric] = float(points[-1].value)
    return reports

"""What the Directory keeps and answers: one `Membership`, the last words of every replica and router, long polls.

Knows no Ray. The clock is passed in; nothing here sleeps except a long poll, which waits on its condition. All methods
belong to one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.config import deployment_name
from cluster.decisions import PolicyReport
from cluster.health_reasons import ROUTER_SILENCE_TOLD_S, Heard, Reason, degraded
from cluster.loads import LoadReport, RecordedLoads
from cluster.membership import Epoch, Membership, Replica, State, View
from cluster.snapshot import ROUTER, ClusterFacts, cluster_snapshot, health, ready_replicas, reasons
from cluster.stats import ReplicaStats, RouterStats, StartFailure
from cluster.transport_totals import TransportTotals
from deployments.directory_metering import Standing
from deployments.loading import Loading, StartsUnderWay

logger = logging.getLogger(__name__)

ROUTER_TIMEOUT_S = 5.0
"""A router unheard of for longer is not counted any more."""
FOLD_AFTER_S = 600.0
"""A router unheard of for longer is given up: its rows and bytes stay in the sums, what it kept apart goes."""
KEPT_FAILURES = 5
"""How many failed starts are remembered of a group, and of the routers."""


class DirectoryCore:
    """The Directory without its deployment.

    incarnation: unique to this start; it is half of every epoch. clock: seconds, monotonic.
    """

    def __init__(self, facts: ClusterFacts, *, incarnation: str, clock: Callable[[], float]) -> None:
        self._facts = facts
        self._clock = clock
        self._membership = Membership(incarnation)
        self._changed = asyncio.Condition()
        self._replica_stats: dict[str, ReplicaStats] = {}
        self._routers: dict[str, tuple[float, RouterStats]] = {}
        self._policy: PolicyReport | None = None
        self._policy_heard_s = clock()
        self._silent: dict[str, float] = {}
        # Kept for routers that are gone, too: the sum over all of them must never fall.
        self._router_bytes = TransportTotals()
        self._loads = RecordedLoads(facts.experts.values(), facts.digest)
        self._totals_heard: dict[str, float] = {}
        self._other_models: set[str] = set()
        self._started_s = clock()
        self._ready: set[str] = set()
        self._failures: dict[str, deque[StartFailure]] = {}
        self._failed_starts: Counter[str] = Counter()
        self._starts = StartsUnderWay()

    async def report(self, replica: Replica, stats: ReplicaStats) -> bool:
        """Registration and heartbeat. False tells the replica to stop: its id has left, or is somebody else's."""
        before = self._membership.epoch
        taken = self._membership.report(replica, self._clock())
        if taken:
            self._replica_stats[replica.id] = stats
            if replica.state is State.READY and replica.id not in self._ready:
                self._ready.add(replica.id)
                self._started(replica.group, replica.digest, deployment_name(replica.group, replica.pool))
        else:
            logger.warning("replica %s of %s is refused: its id has left or is taken", replica.id, replica.group)
        await self._announce(before)
        return taken

    async def leave(self, replica_id: str) -> None:
        """The replica stops, by its own word. Idempotent."""
        before = self._membership.epoch
        self._membership.leave(replica_id)
        self._forget(replica_id)
        await self._announce(before)

    async def lost(self, replica_id: str, by: str) -> None:
        """Router `by` cannot reach the replica: a hint that counts only while no heartbeat comes."""
        logger.warning("router %s cannot reach replica %s", by, replica_id)
        self._membership.suspect(replica_id)
        await self.expire()

    async def expire(self) -> None:
        """Remove replicas and routers that have been silent too long. To be called about twice a second."""
        before, now = self._membership.epoch, self._clock()
        for replica_id in self._membership.expire(now):
            logger.warning("replica %s has been silent too long and is taken out", replica_id)
            self._forget(replica_id)
        for router_id in [rid for rid, (heard, _) in self._routers.items() if now - heard > ROUTER_TIMEOUT_S]:
            logger.warning("router %s has been silent too long", router_id)
            self._silent[router_id], _ = self._routers.pop(router_id)
        for router_id in [rid for rid, heard in self._silent.items() if now - heard > ROUTER_SILENCE_TOLD_S]:
            del self._silent[router_id]
        for router_id in [rid for rid, heard in self._totals_heard.items() if now - heard > FOLD_AFTER_S]:
            self._router_bytes.fold(router_id)
            self._loads.fold(router_id)
            self._other_models.discard(router_id)
            del self._totals_heard[router_id]
        for failure in self._starts.vanished(now):
            self._remember(failure)
        for failure in self._starts.forget(now):
            self._take_back(failure)
            self._failed_starts[failure.part] += 1  # only now, since a count cannot be taken back
        await self._announce(before)

    async def view(self, known: Epoch | None, timeout_s: float) -> View:
        """The current view: at once where its epoch is not `known`, else when it changes or `timeout_s` has passed."""
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._membership.epoch != known)
            except TimeoutError:
                pass
            return self._membership.view()

    async def report_router(self, stats: RouterStats) -> None:
        """The heartbeat of a router."""
        if stats.id not in self._totals_heard:  # one that was only silent for a while has not started
            self._started(ROUTER, stats.digest)
        self._silent.pop(stats.id, None)
        self._routers[stats.id] = (self._clock(), stats)
        self._totals_heard[stats.id] = self._clock()
        self._router_bytes.take(stats.id, stats.transport_bytes)

    async def report_policy(self, report: PolicyReport) -> None:
        """What the autoscaler says: its policy and its last decisions, all of them each time."""
        self._policy, self._policy_heard_s = report, self._clock()

    async def report_loads(self, report: LoadReport) -> None:
        """Rows of each expert so far, from a router, every few seconds and when it stops."""
        if report.last:
            self._routers.pop(report.router, None)
            self._silent.pop(report.router, None)
        self._totals_heard[report.router] = self._clock()
        if not self._loads.take(report) and report.router not in self._other_models:
            self._other_models.add(report.router)  # said once, not with every report
            logger.warning("the loads of router %s are of another model and are not counted", report.router)

    async def report_failure(self, failure: StartFailure) -> None:
        """A replica could not start. Remembered until one of the same deployment and model can."""
        self._remember(failure)
        self._failed_starts[failure.part] += 1

    async def report_loading(self, word: Loading) -> None:
        """A replica loads, or has just ended that. One that says no more cannot start, see `StartsUnderWay`."""
        disproved = self._starts.hear(word, self._clock())
        if disproved is not None:
            logger.warning("a replica of %s was only silent while it loaded", word.deployment)
            self._take_back(disproved)

    def needed(self, replica: Replica) -> bool:
        """Whether a replica that was told to stop is all that routers of its model have of its group.

        Old routers finish their streams with old experts, however long the new ones have been there. A Directory that
        has just started has not heard of every router yet, and spares nobody until it has.
        """
        others = self._membership.view().of(replica.digest).ready(replica.group)
        if any(other.id != replica.id for other in others):
            return False
        settled = self._clock() - self._started_s > ROUTER_TIMEOUT_S
        return not settled or any(router.digest == replica.digest for router in self._live_routers())

    def lacking(self, digest: str, groups: Sequence[str]) -> tuple[int, list[str]]:
        """For a new router of the model `digest`: how many routers are heard, and which of its groups are not ready.

        The latter only while routers of another model answer: requests are better off with those until then.
        """
        routers = self._live_routers()
        others = any(router.digest not in ("", digest) for router in routers)
        return len(routers), [*self._membership.view().of(digest).missing(groups)] if others else []

    def loads(self) -> dict[str, Any]:
        """The body of `/v1/cluster/loads`."""
        return self._loads.as_load_file()

    def snapshot(self, targets: Mapping[str, int]) -> dict[str, Any]:
        """The body of `/v1/cluster`; `targets` maps deployments to the replicas Serve works towards."""
        return cluster_snapshot(
            self._facts,
            self._membership.view(),
            self._replica_stats,
            self._live_routers(),
            self._router_bytes.total(),
            targets,
            self._policy,
            self._failures,
        )

    def health(self) -> tuple[bool, list[str]]:
        """Whether requests can be answered, and what is missing."""
        return health(self._facts, self._membership.view(), self._live_routers())

    def reasons(self) -> dict[str, str]:
        """What could not start, and why."""
        return reasons(self._failures)

    def degraded(self) -> dict[str, str]:
        """What is wrong although requests can be answered: reason -> a sentence."""
        now = self._clock()
        return degraded(
            Heard(
                policy=self._policy,
                policy_silence_s=self._policy_silence_s(),
                view_age_s={r.id: r.view_age_s for r in self._live_routers() if r.view_age_s is not None},
                silent_s={router_id: now - heard for router_id, heard in self._silent.items()},
            )
        )

    def standing(self) -> Standing:
        """What the Directory's metrics tell."""
        holding = self.degraded()
        return Standing(
            view=self._membership.view(),
            ready=ready_replicas(self._facts, self._membership.view(), self._live_routers()),
            groups=self._facts.required,
            routers=len(self._routers),
            failed_starts=self._failed_starts,
            rows=self._loads.risen(),
            policy_silence_s=self._policy_silence_s(),
            degraded={reason.value: reason.value in holding for reason in Reason},
        )

    def _policy_silence_s(self) -> float | None:
        return self._clock() - self._policy_heard_s if self._facts.elastic or self._policy is not None else None

    def _started(self, part: str, digest: str, deployment: str | None = None) -> None:
        # A part of an old version, or in another pool, that starts says nothing of those that could not.
        listed = self._failures.pop(part, deque())
        kept = [each for each in listed if each.digest != digest or deployment not in (None, each.deployment)]
        if kept:
            self._failures[part] = deque(kept, maxlen=KEPT_FAILURES)

    def _remember(self, failure: StartFailure) -> None:
        logger.warning("a replica of %s cannot start: %s", failure.deployment, failure.reason)
        self._failures.setdefault(failure.part, deque(maxlen=KEPT_FAILURES)).append(failure)

    def _take_back(self, failure: StartFailure) -> None:
        listed = self._failures.get(failure.part, deque())
        if failure in listed:  # else a success has cleared it
            listed.remove(failure)
        if not listed:
            self._failures.pop(failure.part, None)

    def _forget(self, replica_id: str) -> None:
        self._replica_stats.pop(replica_id, None)
        self._ready.discard(replica_id)

    def _live_routers(self) -> list[RouterStats]:
        return [stats for _, stats in self._routers.values()]

    async def _announce(self, before: Epoch) -> None:
        if self._membership.epoch != before:
            async with self._changed:
                self._changed.notify_all()

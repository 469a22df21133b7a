"""The `Directory` deployment: who holds which experts, where. One replica; it may die and come back empty.

A Serve shell around `DirectoryCore`. Expert replicas report every second and so fill a restarted Directory by
themselves; routers long-poll `view`. Nothing on the path of a token waits for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from cluster.config import ExpertsSpec
from cluster.decisions import PolicyReport
from cluster.loads import LoadReport
from cluster.membership import Epoch, Replica, View
from cluster.metering import Meter, Publishing
from cluster.placement import Placement
from cluster.ray_metrics import RayInstruments
from cluster.serve_logging import log_through_serve
from cluster.snapshot import cluster_facts
from cluster.stats import ReplicaStats, RouterStats, StartFailure
from deployments.directory_core import DirectoryCore
from deployments.directory_metering import DirectoryMetering
from deployments.loading import Loading

EXPIRY_PERIOD_S = 0.5


# Each router holds one long poll, so far more calls are open than run. Those polls must not hold up a shutdown.
@serve.deployment(
    name="Directory",
    num_replicas=1,
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=1,
    graceful_shutdown_wait_loop_s=0.1,
)
class Directory:
    """Membership, long-polled by routers; the source of `/v1/cluster` and `/health`.

    digest: the model digest in hex. elastic_routers: a policy decides how many routers there are.
    """

    def __init__(
        self, model: str, digest: str, placement: Placement, experts: ExpertsSpec, elastic_routers: bool
    ) -> None:
        # A heartbeat a second from everybody would drown the lines a person looks for.
        log_through_serve(access=False)
        facts = cluster_facts(model, digest, placement, experts, elastic_routers)
        self._core = DirectoryCore(facts, incarnation=secrets.token_hex(8), clock=time.monotonic)
        self._expiry: asyncio.Task[None] | None = None
        metering = DirectoryMetering(self._core.standing, time.monotonic)
        self._publishing = Publishing(metering.tell, Meter(RayInstruments()))

    async def report(self, replica: Replica, stats: ReplicaStats) -> bool:
        """Registration and heartbeat of an expert replica; False tells it to stop."""
        self._ensure_expiry()
        return await self._core.report(replica, stats)

    async def leave(self, replica_id: str) -> None:
        """The replica stops and its id is never used again."""
        await self._core.leave(replica_id)

    async def needed(self, replica: Replica) -> bool:
        """Whether a replica that was told to stop must wait for the routers of its model."""
        self._ensure_expiry()
        return self._core.needed(replica)

    async def report_failure(self, failure: StartFailure) -> None:
        """A replica could not start."""
        await self._core.report_failure(failure)

    async def report_loading(self, word: Loading) -> None:
        """A replica loads; its silence is noticed."""
        self._ensure_expiry()
        await self._core.report_loading(word)

    async def lost(self, replica_id: str, by: str) -> None:
        """Router `by` cannot reach the replica."""
        await self._core.lost(replica_id, by)

    async def view(self, known: Epoch | None, timeout_s: float) -> View:
        """The current view, at once where it differs from `known`, else on the next change or after `timeout_s`."""
        self._ensure_expiry()
        return await self._core.view(known, timeout_s)

    async def report_router(self, stats: RouterStats) -> None:
        """Heartbeat of a router."""
        self._ensure_expiry()
        await self._core.report_router(stats)

    async def report_policy(self, report: PolicyReport) -> None:
        """Heartbeat of the autoscaler."""
        await self._core.report_policy(report)

    async def report_loads(self, report: LoadReport) -> None:
        """Rows of each expert so far, from a router."""
        await self._core.report_loads(report)

    async def lacking(self, digest: str, groups: Sequence[str]) -> tuple[int, list[str]]:
        """What a new router of that model should wait for; see `DirectoryCore.lacking`."""
        self._ensure_expiry()
        return self._core.lacking(digest, groups)

    async def loads(self) -> dict[str, Any]:
        """The body of `/v1/cluster/loads`."""
        return self._core.loads()

    async def snapshot(self, targets: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The body of `/v1/cluster`."""
        return self._core.snapshot(targets or {})

    async def health(self) -> tuple[bool, list[str], dict[str, str]]:
        """(ready, what is missing, why what could not start could not)."""
        return *self._core.health(), self._core.reasons()

    async def degraded(self) -> dict[str, str]:
        """What is wrong although requests can be answered."""
        return self._core.degraded()

    def _ensure_expiry(self) -> None:
        # Started by the first call, because only then is there a loop that it may belong to.
        if self._expiry is None or self._expiry.done():
            # In a context of its own: that of the call would stamp the caller's request id on all its lines of the log.
            self._expiry = asyncio.create_task(self._expire_forever(), context=contextvars.Context())
            self._publishing.start()

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            await self._core.expire()

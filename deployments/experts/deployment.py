"""The `experts-N` deployments: one Serve replica is one copy of an expert group. A shell around `ExpertReplica`.

Rows do not come through Serve: routers connect to the replica's own server, which it announces in the Directory. So
load and drain are reported from here. Knows no arithmetic.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.blueprint import Blueprint
from cluster.config import HOME_POOL, AppConfig, EmulateSpec
from cluster.keys import cluster_key
from cluster.membership import State
from cluster.metering import Meter, Publishing
from cluster.ray_metrics import RayInstruments
from cluster.serve_logging import log_through_serve
from cluster.stats import ReplicaStats
from cluster.telemetry import flush, tracer
from deployments.directory_client import Registration
from deployments.experts.farewell import until_spared
from deployments.experts.metering import tell
from deployments.node import device_of, listen_host, node_id
from deployments.start_trouble import telling

logger = logging.getLogger(__name__)

LEAST_STUCK_S, STUCK_TIMES = 30.0, 3.0
"""A batch that takes longer, and so many times the routers' patience, hangs: nobody waits for it any more."""


@serve.deployment(name="experts")
class ExpertGroup:
    """Loads its experts, serves their rows, reports to the Directory, and drains before it goes."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        args: AppConfig,
        blueprint: Blueprint,
        index: int,
        pool: str,
        emulate: EmulateSpec | None,
        directory: DeploymentHandle,
    ) -> None:
        log_through_serve()
        # torch takes two seconds to import: only replicas pay for it, not the process that builds the application.
        from cluster.fabric.ray_references import RayReferences
        from cluster.fabric.store_codec import StoreCodec
        from deployments.experts.replica import ExpertReplica

        self._directory = directory
        self._timeout_s = args.experts.timeout_s
        self._longest_s = args.ingress.request_timeout_s
        resources = args.experts.resources if pool == HOME_POOL else args.experts.pools[pool].resources
        context = serve.get_replica_context()
        group, digest = args.experts.group_names[index], blueprint.digest.hex()
        replica_id = f"{context.deployment}#{context.replica_id.unique_id}"
        resource = {"service.instance.id": replica_id, "expertscale.group": group, "expertscale.digest": digest}
        self._tracer = tracer("expertscale-experts", resource, os.environ)
        async with telling(directory, part=group, deployment=context.deployment, digest=digest):
            self._replica = await asyncio.to_thread(
                ExpertReplica,
                blueprint,
                args.experts,
                index,
                replica_id=replica_id,
                key=cluster_key(args.security, os.environ),
                node=node_id(),
                pool=pool,
                emulate_rows_per_s=emulate.rows_per_s if emulate else None,
                device=device_of(resources),
                host=listen_host(args.experts.host),
                batch_invariant=args.router.batch_invariant,
                references=StoreCodec(RayReferences()) if args.experts.transport in ("object_store", "auto") else None,
                tracer=self._tracer,
            )
        self._meter = _Meter()
        self._started_at, self._reports = time.monotonic(), 0
        self._refused = False
        self._pool = pool
        self._publishing = Publishing(self._tell, Meter(RayInstruments()))
        self._registration = Registration(
            directory, self._replica.record(State.READY), self._stats, on_refused=self._on_refused
        )
        self._registration.start()
        self._publishing.start()
        logger.info(
            "%s: %.1f MiB of experts, %.0f rows per second",
            self._replica.group,
            self._replica.weights.parameter_bytes / 2**20,
            self._replica.speed_rows_per_s,
        )
        if emulate:
            logger.warning("emulated device: answers no faster than %g rows per second", emulate.rows_per_s)

    def check_health(self) -> None:
        """Serve's health check: the server's thread runs and gets ahead, and the Directory has not refused it."""
        if not self._replica.server.alive:
            raise RuntimeError("the fabric server of this replica has stopped")
        stuck_s = self._replica.server.stuck_s()
        if stuck_s > max(LEAST_STUCK_S, STUCK_TIMES * self._timeout_s):
            raise RuntimeError(f"the fabric server of this replica has computed one batch for {stuck_s:.0f} s")
        if self._refused:
            raise RuntimeError("the directory has refused this replica")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Load for the autoscaler; `autoscale.observer` says what each number means."""
        stats = self._replica.server.stats()
        self._reports += 1
        return {
            "seq": float(self._reports),
            "uptime_s": time.monotonic() - self._started_at,
            "rows": float(stats.rows),
            "busy_s": stats.busy_s,
            "queue_rows": float(stats.queue_rows),
            "speed_rows_per_s": self._replica.speed_rows_per_s,
        }

    async def __del__(self) -> None:
        """Serve's call on shutdown, possibly more than once.

        Say so, wait for routers that have nobody else, say GOAWAY, finish and flush, deregister, stop.
        """
        if not hasattr(self, "_registration"):
            return  # the constructor failed; there is nothing to take down
        record, server = self._replica.record(State.DRAINING), self._replica.server
        await self._registration.update(record)
        await until_spared(self._directory, record, lambda: server.stats().connections, self._longest_s)
        await asyncio.to_thread(self._replica.drain, self._timeout_s)
        await self._registration.leave()
        self._publishing.stop()
        await asyncio.to_thread(self._replica.close)
        await asyncio.to_thread(flush, self._tracer)

    def _stats(self) -> ReplicaStats:
        stats = self._replica.server.stats()
        return ReplicaStats(rows=stats.rows, utilization=self._meter.share(stats.busy_s), queue_rows=stats.queue_rows)

    def _tell(self, meter: Meter) -> None:
        replica = self._replica
        speed = replica.speed_rows_per_s
        tell(meter, replica.server.stats(), speed_rows_per_s=speed, group=replica.group, pool=self._pool)

    def _on_refused(self) -> None:
        self._refused = True


class _Meter:
    """Turns a total of busy seconds into the busy share of the time since the last reading."""

    def __init__(self) -> None:
        self._read_at, self._busy_s = time.monotonic(), 0.0

    def share(self, busy_s: float) -> float:
        now = time.monotonic()
        elapsed, worked = max(now - self._read_at, 1e-3), busy_s - self._busy_s
        self._read_at, self._busy_s = now, busy_s
        return min(1.0, max(0.0, worked / elapsed))

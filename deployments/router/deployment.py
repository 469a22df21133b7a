"""The `Router` deployment: a Serve shell around `RouterRuntime`. Knows no model and no HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.blueprint import Blueprint
from cluster.config import AppConfig
from cluster.errors import RouterStoppingError
from cluster.keys import cluster_key
from cluster.loads import LoadReport
from cluster.membership import Epoch, View
from cluster.metering import Meter, Publishing
from cluster.ray_metrics import RayInstruments
from cluster.serve_logging import log_through_serve
from cluster.snapshot import ROUTER
from cluster.stats import RouterStats
from cluster.telemetry import flush, tracer
from deployments.directory_client import RouterLink, call
from deployments.generation import GenerationRequest, Pulse, TokenChunk
from deployments.node import device_of, node_id
from deployments.rollout import wait_for_experts, wait_for_front
from deployments.router.affinity import may_answer
from deployments.router.metering import tell_engine, tell_fabric, tell_view
from deployments.router.outbox import generate
from deployments.router.pace import Pace
from deployments.start_trouble import telling

logger = logging.getLogger(__name__)


def _resource(id: str, blueprint: Blueprint) -> dict[str, str]:
    return {"service.instance.id": id, "expertscale.digest": blueprint.digest.hex()}


@serve.deployment(name="Router")
class Router:
    """Generates tokens: streams `TokenChunk`s and signs of life for a `GenerationRequest`, raises errors of
    `cluster.errors`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: AppConfig, blueprint: Blueprint, directory: DeploymentHandle
    ) -> None:
        log_through_serve(access=False)  # the Ingress logs every request already
        # torch and transformers: only replicas pay for the import, not the process that builds the application.
        from deployments.router.load import LoadMeter, LoadReporter
        from deployments.router.runtime import RouterRuntime

        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._model = {"digest": blueprint.digest.hex(), "vocabulary": blueprint.vocabulary}
        self._local = args.experts.transport == "local"
        self._meter = LoadMeter(self._id)
        self._pace = Pace(args.router.chunks_per_s)
        groups = self._groups = () if self._local else args.experts.group_names
        self._view = View(Epoch("", 0))
        self._publishing = Publishing(self._tell, Meter(RayInstruments()))
        self._reporter = LoadReporter(groups, clock=time.monotonic)
        self._link = RouterLink(
            directory,
            groups,
            digest=blueprint.digest.hex(),
            on_view=self._on_view,
            stats=self._stats,
            loads=self._loads,
        )
        self._tracer = tracer("expertscale-router", _resource(self._id, blueprint), os.environ)
        async with telling(directory, part=ROUTER, deployment=context.deployment, digest=self._model["digest"]):
            self._runtime = await asyncio.to_thread(
                RouterRuntime,
                blueprint,
                args.experts,
                args.router,
                key=cluster_key(args.security, os.environ),
                node=node_id(),
                device=device_of(args.router.resources),
                on_lost=self._link.lost,
                tracer=self._tracer,
            )
            await wait_for_front(context.app_name)
        if not self._local:
            digest = self._model["digest"]
            await wait_for_experts(context.app_name, lambda: call(directory.lacking.remote(digest, groups)))
        backbone = self._runtime.backbone
        sizes = (self._runtime.parameter_bytes / 2**20, backbone.kv_pool_bytes / 2**20, backbone.max_context)
        logger.info("%.1f MiB of weights without experts, %.1f MiB of KV pool, context of %d tokens", *sizes)
        if blueprint.plan.context_reason is not None:
            logger.warning("the context is shorter than the model's own: %s", blueprint.plan.context_reason)
        self._runtime.start()
        self._link.start()
        self._publishing.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk | Pulse]:
        """Chunks at the router's pace, several tokens in one among many; closing the stream cancels the request.

        Raises:
            RouterStoppingError: it belongs to another version of the model, of which there are no routers.
            ExpertScaleError: what the engine raises.
        """
        if not may_answer(request, self._model):
            raise RouterStoppingError("No router serves the model of this request now; try again.")
        unsaid = True
        async for message in generate(self._runtime.engine, request, self._pace, pulse=Pulse(self._id)):
            if unsaid and isinstance(message, TokenChunk):
                unsaid = False
                yield replace(message, digest=self._model["digest"])
            else:
                yield message

    def record_replica_metadata(self) -> dict[str, str]:
        """For `AffinityRouter`: whose requests this router can answer."""
        return self._model

    def check_health(self) -> None:
        """Serve's health check."""
        if not self._runtime.engine.alive:
            raise RuntimeError("the engine's thread has stopped")
        if not self._runtime.engine.responsive:
            raise RuntimeError("the engine's thread hangs: it is longer in one layer than any layer can take")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Load for the autoscaler; `LoadReporter.read` says what each number means."""
        engine, dispatcher = self._runtime.engine, self._runtime.dispatcher
        return self._reporter.read(engine.stats(), dispatcher.stats(), engine.latency(), engine.undecoded())

    async def __del__(self) -> None:
        """Serve's call on shutdown, once the streams have ended; possibly more than once."""
        if hasattr(self, "_runtime"):
            # The engine first: what the link says last includes the rows of its last step.
            await asyncio.to_thread(self._runtime.stop)
            await self._link.stop()
            self._publishing.stop()
            await asyncio.to_thread(flush, self._tracer)

    def _on_view(self, view: View) -> None:
        self._view = view
        if not self._local:  # a router that holds all experts itself has a view of its own
            self._runtime.dispatcher.update(view)

    def _stats(self) -> RouterStats:
        engine = self._runtime.engine
        return self._meter.read(engine.stats(), self._runtime.dispatcher.stats(), engine.latency())

    def _tell(self, meter: Meter) -> None:
        tell_engine(meter, self._runtime.engine.stats())
        tell_fabric(meter, self._runtime.dispatcher.stats())
        tell_view(meter, self._link.view_age_s, {group: len(self._view.ready(group)) for group in self._groups})

    def _loads(self) -> LoadReport:
        return LoadReport(self._id, self._runtime.dispatcher.loads(), digest=self._model["digest"])

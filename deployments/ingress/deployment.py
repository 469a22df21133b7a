"""The `Ingress` deployment: the HTTP app of `api.py` inside a Serve replica. Knows no model arithmetic."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve._private import constants
from ray.serve.handle import DeploymentHandle

from cluster.blueprint import Blueprint
from cluster.config import AppConfig, resolve
from cluster.metering import Meter, Publishing
from cluster.ray_metrics import RayInstruments
from cluster.serve_logging import log_through_serve
from cluster.telemetry import tracer
from deployments.directory_client import ClusterReader
from deployments.ingress.exposure import EVERYWHERE, refuse_open
from deployments.targets import TargetReplicas

if TYPE_CHECKING:
    from deployments.ingress.service import Service


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Answers HTTP. `experts` is here only because Serve deploys what the root of the application refers to."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        args: AppConfig,
        blueprint: Blueprint,
        router: DeploymentHandle,
        directory: DeploymentHandle,
        experts: list[DeploymentHandle],
    ) -> None:
        log_through_serve()
        refuse_open(await _listening_host(), args.security)
        meter = Meter(RayInstruments())
        self._service = _service(args, blueprint, router, directory, meter)
        self._publishing = Publishing(self._service.metering.tell, meter)
        self._publishing.start()
        self._experts = experts

    def __serve_build_asgi_app__(self) -> Any:
        """Serve's hook: the ASGI app, made once the replica is."""
        from deployments.ingress.api import create_app

        return create_app(self._service)


async def _listening_host() -> str | None:
    """What the HTTP proxies in front of this replica listen on; None where there are none."""
    # The lookup blocks on the GCS. The two methods are what Serve's own client asks first.
    controller = await asyncio.to_thread(ray.get_actor, constants.SERVE_CONTROLLER_NAME, namespace="serve")
    location = await controller.get_proxy_location.remote()
    options = await controller.get_http_config.remote()
    # These two modes of Serve listen on every interface whatever the host is.
    everywhere = constants.RAY_SERVE_ENABLE_HA_PROXY or constants.RAY_SERVE_ENABLE_DIRECT_INGRESS
    return None if location == "Disabled" else EVERYWHERE if everywhere else options.host


def _service(
    args: AppConfig, blueprint: Blueprint, router: DeploymentHandle, directory: DeploymentHandle, meter: Meter
) -> Service:
    # The tokenizer drags in transformers: only replicas pay for it, not the process that builds the application.
    from transformers import AutoConfig

    from deployments.ingress.auth import authenticator
    from deployments.ingress.chat import ChatTokenizer
    from deployments.ingress.handles import DirectoryCluster, RouterHandle
    from deployments.ingress.leaving import Leaving
    from deployments.ingress.limits import Limiter
    from deployments.ingress.metering import RequestMetering
    from deployments.ingress.responses import fingerprint
    from deployments.ingress.resume import ResumingRouter
    from deployments.ingress.service import ServedModel, Service

    config = AutoConfig.from_pretrained(blueprint.model_path, local_files_only=True, trust_remote_code=False)
    context = serve.get_replica_context()
    application = context.app_name
    metering = RequestMetering(meter)
    return Service(
        model=ServedModel(
            name=args.model.served_name,
            # No sequence can be longer than the pool that must hold it.
            max_context=min(blueprint.plan.max_context, args.router.kv_tokens),
            vocab_size=config.get_text_config().vocab_size,
            created=int(time.time()),
            fingerprint=fingerprint(blueprint.digest.hex()),
        ),
        tokenizer=ChatTokenizer.load(resolve(blueprint.model_path)),
        router=ResumingRouter(
            RouterHandle(router, silence_s=args.ingress.silence_s, vocabulary=blueprint.vocabulary),
            clock=time.monotonic,
            on_loss=metering.resumed,
        ),
        cluster=DirectoryCluster(ClusterReader(directory, TargetReplicas(application))),
        auth=authenticator(args.security),
        limiter=Limiter(time.monotonic),
        max_body_bytes=args.ingress.max_body_bytes,
        request_timeout_s=args.ingress.request_timeout_s,
        tracer=tracer("expertscale-ingress", {"expertscale.digest": blueprint.digest.hex()}, os.environ),
        metering=metering,
        leaving=Leaving(application, context.deployment, context.replica_id.unique_id),
    )

"""The `Ingress` deployment: the HTTP app of `api.py` inside a Serve replica. Knows no model arithmetic."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.blueprint import Blueprint
from cluster.config import AppConfig, resolve
from cluster.serve_logging import log_through_serve
from deployments.directory_client import ClusterReader
from deployments.targets import TargetReplicas

if TYPE_CHECKING:
    from deployments.ingress.service import Service


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Answers HTTP. `experts` is here only because Serve deploys what the root of the application refers to."""

    def __init__(
        self,
        args: AppConfig,
        blueprint: Blueprint,
        router: DeploymentHandle,
        directory: DeploymentHandle,
        experts: list[DeploymentHandle],
    ) -> None:
        log_through_serve()
        self._service = _service(args, blueprint, router, directory)
        self._experts = experts

    def __serve_build_asgi_app__(self) -> Any:
        """Serve's hook: the ASGI app, made once the replica is."""
        from deployments.ingress.api import create_app

        return create_app(self._service)


def _service(args: AppConfig, blueprint: Blueprint, router: DeploymentHandle, directory: DeploymentHandle) -> Service:
    # The tokenizer drags in transformers: only replicas pay for it, not the process that builds the application.
    from transformers import AutoConfig

    from deployments.ingress.auth import Authenticator, KeyFile
    from deployments.ingress.chat import ChatTokenizer
    from deployments.ingress.handles import DirectoryCluster, RouterHandle
    from deployments.ingress.resume import ResumingRouter
    from deployments.ingress.service import ServedModel, Service

    config = AutoConfig.from_pretrained(blueprint.model_path, local_files_only=True, trust_remote_code=False)
    keys = (args.security.api_keys_file, args.security.admin_keys_file)
    api_keys, admin_keys = (None if name is None else KeyFile(resolve(name)) for name in keys)
    application = serve.get_replica_context().app_name
    return Service(
        model=ServedModel(
            name=args.model.served_name,
            # No sequence can be longer than the pool that must hold it.
            max_context=min(blueprint.plan.max_context, args.router.kv_tokens),
            vocab_size=config.get_text_config().vocab_size,
            created=int(time.time()),
            fingerprint=f"xs-{blueprint.digest.hex()[:12]}",
        ),
        tokenizer=ChatTokenizer.load(resolve(blueprint.model_path)),
        router=ResumingRouter(RouterHandle(router), clock=time.monotonic),
        cluster=DirectoryCluster(ClusterReader(directory, TargetReplicas(application))),
        auth=Authenticator(api_keys, admin_keys),
        max_body_bytes=args.ingress.max_body_bytes,
        request_timeout_s=args.ingress.request_timeout_s,
    )

"""An application of the demo's shape without weights: same deployments, same imports, nothing loaded.

The yardstick for start-up: what Ray, Serve and the imports cost whoever deploys this many replicas.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

GROUPS = 4


@serve.deployment(name="Directory")
class Directory:
    def __init__(self) -> None:
        import deployments.directory_core  # noqa: F401


@serve.deployment(name="experts")
class ExpertGroup:
    def __init__(self, directory: DeploymentHandle) -> None:  # noqa: ARG002
        import deployments.experts.replica  # noqa: F401


@serve.deployment(name="Router")
class Router:
    def __init__(self, directory: DeploymentHandle) -> None:  # noqa: ARG002
        import transformers.models.deepseek_v3.modeling_deepseek_v3 as model

        import deployments.router.runtime

        _ = model, deployments.router.runtime

    def answer(self) -> str:
        return "ready"


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    def __init__(self, router: DeploymentHandle, directory: Any, experts: list[DeploymentHandle]) -> None:  # noqa: ARG002
        import transformers

        import deployments.ingress.api

        _ = transformers.AutoTokenizer, deployments.ingress.api
        self._router = router

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        router = self._router

        @app.get("/health")
        async def health() -> str:
            # A router that answers, as the first completion needs one.
            return await router.answer.remote()

        return app


def build(_: dict[str, Any]) -> serve.Application:
    """The application; it takes no arguments, but Serve passes some."""
    small = {"ray_actor_options": {"num_cpus": 0.1}}
    directory = Directory.options(**small).bind()
    experts = [ExpertGroup.options(name=f"experts-{index}", **small).bind(directory) for index in range(GROUPS)]
    return Ingress.options(**small).bind(Router.options(**small).bind(directory), directory, experts)

"""Yardsticks for start-up: applications that start the same processes and imports as ours and load nothing.

`build` has the shape of the demo, deployment by deployment; `bare` is one deployment that only imports torch. What they
take, Ray, Serve and the imports cost anybody.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

GROUPS = 4
SMALL: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}}


@serve.deployment(name="Directory")
class Directory:
    """Imports what ours imports."""

    def __init__(self) -> None:
        import deployments.directory_core  # noqa: F401


@serve.deployment(name="experts")
class ExpertGroup:
    """Imports what ours imports; serves no rows."""

    def __init__(self, directory: DeploymentHandle) -> None:  # noqa: ARG002
        import deployments.experts.replica  # noqa: F401


@serve.deployment(name="Router")
class Router:
    """Imports the model's class, as loading its weights would."""

    def __init__(self, directory: DeploymentHandle) -> None:  # noqa: ARG002
        import transformers.models.deepseek_v3.modeling_deepseek_v3 as model

        import deployments.router.runtime

        _ = model, deployments.router.runtime

    def answer(self) -> str:
        """In place of a first token."""
        return "ready"


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """HTTP with one path, `/health`."""

    def __init__(self, router: DeploymentHandle, directory: Any, experts: list[DeploymentHandle]) -> None:  # noqa: ARG002
        import transformers

        import deployments.ingress.api

        _ = transformers.AutoTokenizer, deployments.ingress.api
        self._router = router

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: the ASGI app, made once the replica is."""
        app = FastAPI()
        router = self._router

        @app.get("/health")
        async def health() -> str:
            # A router that answers, as a first token needs one.
            answer: str = await router.answer.remote()
            return answer

        return app


@serve.deployment(name="Bare")
class Bare:
    """A replica that imports torch and nothing else."""

    def __init__(self) -> None:
        import torch  # noqa: F401


def build(_: dict[str, Any]) -> serve.Application:
    """The demo's shape. It takes no arguments, but Serve passes some."""
    directory = Directory.options(**SMALL).bind()  # type: ignore[attr-defined]
    experts = [
        ExpertGroup.options(name=f"experts-{index}", **SMALL).bind(directory)  # type: ignore[attr-defined]
        for index in range(GROUPS)
    ]
    router = Router.options(**SMALL).bind(directory)  # type: ignore[attr-defined]
    return Ingress.options(**SMALL).bind(router, directory, experts)  # type: ignore[attr-defined]


def bare(_: dict[str, Any]) -> serve.Application:
    """One replica, to which others are added."""
    return Bare.options(**SMALL).bind()  # type: ignore[attr-defined]

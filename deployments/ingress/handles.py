"""The Ingress's way to routers and Directory over Serve handles; turns Ray's errors into ours. Knows no HTTP."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.errors import ExpertScaleError, OverloadedError, RouterStoppingError
from deployments.directory_client import ClusterReader
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.clients import Health

logger = logging.getLogger(__name__)


class RouterHandle:
    """A `RouterClient` over the handle of the Router deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(stream=True, method_name="generate")

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one router's answer; closing the generator cancels the request there.

        Raises:
            OverloadedError: the handle's queue is full. RouterStoppingError: the router went away.
            ExpertScaleError: whatever the router raised.
        """
        stream = self._handle.options(session_id=session_id or "").remote(request)
        ended = False
        try:
            async for chunk in stream:
                yield chunk
            ended = True
        except Exception as error:
            ended = True
            raise translated(error) from None
        finally:
            if not ended:
                stream.cancel()


class DirectoryCluster:
    """A `ClusterClient` over the handle of the Directory."""

    def __init__(self, reader: ClusterReader) -> None:
        self._reader = reader

    async def health(self) -> Health:
        """Which parts are missing."""
        _, missing = await self._reader.health()
        return Health(tuple(missing))

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster`."""
        return await self._reader.snapshot()

    async def loads(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster/loads`."""
        return await self._reader.loads()


def translated(error: Exception) -> Exception:
    """The error a client should see for what a call to a router raised; unknown ones stay as they are."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        # Ray wraps what the router raised in a class of its own making.
        error = error.cause
    if isinstance(error, ExpertScaleError):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("Every router is busy and the queue is full; try again in a moment.")
    if isinstance(error, (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError)):
        logger.warning("a router went away in the middle of a request: %s", error)
        return RouterStoppingError("The router that worked on this request went away; try again.")
    return error

"""How many replicas of each deployment Serve is working towards, read at most once a second.

`serve.status()` counts replicas but does not say how many there should be. The controller's instance details do: it is
what Serve's REST endpoint `GET /api/serve/applications/` returns, asked for without the dashboard in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray

logger = logging.getLogger(__name__)

TTL_S = 1.0
TIMEOUT_S = 2.0


class TargetReplicas:
    """Deployment -> target replicas of one Serve application; call it in an asyncio loop. Never raises.

    details: fetches Serve's instance details. Where that fails the last answer stands, at first an empty one, so that
    the reader shows what is configured.
    """

    def __init__(
        self,
        application: str,
        *,
        details: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application = application
        self._details = details or serve_details
        self._clock = clock
        self._known: dict[str, int] = {}
        self._fresh_until_s = float("-inf")
        self._lock = asyncio.Lock()

    async def __call__(self) -> dict[str, int]:
        """The targets, at most `TTL_S` old where the controller answers."""
        async with self._lock:
            if self._clock() >= self._fresh_until_s:
                await self._refresh()
        return self._known

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                self._known = target_replicas(await self._details(), self._application)
        except Exception as error:
            logger.warning("the Serve controller does not say its targets, the last ones stand: %r", error)
        self._fresh_until_s = self._clock() + TTL_S


def target_replicas(details: Mapping[str, Any], application: str) -> dict[str, int]:
    """Deployment -> target replicas of `application` in Serve's instance details; empty where it is not there."""
    deployments = details["applications"].get(application, {}).get("deployments", {})
    return {name: int(deployment["target_num_replicas"]) for name, deployment in deployments.items()}


async def serve_details() -> Mapping[str, Any]:
    """Serve's instance details, from the controller of the cluster this process belongs to."""
    # The lookup blocks on the GCS; the names are Serve's own constants, the same since Serve 2.0.
    controller = await asyncio.to_thread(ray.get_actor, "SERVE_CONTROLLER_ACTOR", namespace="serve")
    details: Mapping[str, Any] = await controller.get_serve_instance_details.remote()
    return details

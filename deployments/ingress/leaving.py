"""Whether Serve has told a replica to stop: it then waits for the streams that are open, and says nothing to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deployments.targets import TIMEOUT_S, serve_details

logger = logging.getLogger(__name__)


class Leaving:
    """Asks Serve's controller about one replica; see `Live`. Never raises: who does not know stays."""

    def __init__(
        self,
        application: str,
        deployment: str,
        replica_id: str,
        details: Callable[[], Awaitable[Mapping[str, Any]]] = serve_details,
    ) -> None:
        self._application = application
        self._deployment = deployment
        self._replica_id = replica_id
        self._details = details

    async def __call__(self) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                details = await self._details()
        except Exception as error:
            logger.debug("the Serve controller does not say whether this replica is to stop: %r", error)
            return False
        deployments = details["applications"].get(self._application, {}).get("deployments", {})
        replicas = deployments.get(self._deployment, {}).get("replicas", [])
        return any(
            replica["replica_id"] == self._replica_id
            and str(getattr(replica["state"], "value", replica["state"])) == "STOPPING"
            for replica in replicas
        )

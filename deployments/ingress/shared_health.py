"""One question about the cluster's health for all who ask at about the same time, so that many probes cost as one.

What is shared is the value, not an answer made from it: who asks decides what of it is told. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable

from deployments.ingress.clients import ClusterClient, Health

log = logging.getLogger(__name__)

SHARED_S = 0.5
TIMEOUT_S = 2.0


class SharedHealth:
    """The health of `cluster`, asked for at most every `SHARED_S` and never twice at once. clock: seconds that rise.

    An unknown health is shared as well: a Directory that does not answer is not asked more often than one that does.
    """

    def __init__(self, cluster: ClusterClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._flight: asyncio.Task[Health | None] | None = None
        self._asked_s = 0.0

    async def __call__(self) -> Health | None:
        """Which parts are missing; None where nobody says so within `TIMEOUT_S`."""
        now_s = self._clock()
        flight = self._flight
        if flight is None or flight.cancelled() or (flight.done() and now_s - self._asked_s >= SHARED_S):
            self._asked_s = now_s
            # In a context of its own: Serve cancels the calls of a request whose client has gone, and this is nobody's.
            self._flight = asyncio.get_running_loop().create_task(self._ask(), context=contextvars.Context())
        # One who no longer wants to know must not take the answer away from the others.
        return await asyncio.shield(self._flight)  # type: ignore[arg-type]

    async def _ask(self) -> Health | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._cluster.health()
        except Exception:
            log.warning("the cluster's health is unknown", exc_info=True)
            return None

"""How long an expert replica that was told to stop goes on serving: until no router needs it.

In a rollout the old routers finish their streams, and only the old experts have their weights: an old replica that left
when its successor came would end them. A plain scale-down is over at once, because others of the same model are ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.membership import Replica
from deployments.directory_client import call

logger = logging.getLogger(__name__)

ASK_EVERY_S = 0.3
ANSWER_S = 1.0


async def until_spared(
    directory: Any,
    replica: Replica,
    connections: Callable[[], int],
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> bool:
    """Wait until the Directory says that routers have others than `replica`, or need none; at most `timeout_s`.

    connections: of routers, open now; they decide while the Directory does not answer. Returns whether it was spared.
    """
    asked, give_up_at = 0, clock() + timeout_s
    while True:
        try:
            needed: bool = await call(directory.needed.remote(replica), ANSWER_S)
        except Exception as error:
            logger.info("the directory does not say whether %s is needed: %r", replica.id, error)
            needed = connections() > 0
        if not needed:
            return True
        if clock() >= give_up_at:
            logger.warning("%s leaves although routers of its model have nobody else", replica.id)
            return False
        if not asked:
            logger.info("%s is to stop and goes on for routers that have nobody else", replica.id)
        asked += 1
        await sleep(ASK_EVERY_S)

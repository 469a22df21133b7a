"""The order of a rollout: the new front first, then the new routers.

Serve replaces every deployment for itself: when the first new router runs, the old ones get no new requests. An old
Ingress that still takes requests then, with another tokenizer, would find nobody who understands them. So a new router
runs only when Serve has replaced the Ingress. The other way round nothing is lost: what a new Ingress asks waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deployments.targets import serve_details

logger = logging.getLogger(__name__)

FRONT = "Ingress"
PATIENCE_S = 60.0
ASK_EVERY_S = 0.5
SETTLE_S = 0.5
"""Until the proxies have heard of the change."""


async def wait_for_front(
    application: str,
    *,
    details: Callable[[], Awaitable[Mapping[str, Any]]] = serve_details,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Wait until Serve is done with replacing the Ingress of `application`, `PATIENCE_S` at most. Never raises.

    details: fetches Serve's instance details. Where nobody answers the router goes on: better a request refused than no
    router at all.
    """
    give_up_at = clock() + PATIENCE_S
    while clock() < give_up_at:
        try:
            async with asyncio.timeout(PATIENCE_S):
                front = front_of(await details(), application)
        except Exception as error:
            logger.warning("Serve does not say how far the Ingress is, this router does not wait for it: %r", error)
            return
        if not is_updating(front):
            if is_leaving(front):
                await sleep(SETTLE_S)
            return
        await sleep(ASK_EVERY_S)
    logger.warning("the Ingress is not in place after %g s, this router does not wait for it any longer", PATIENCE_S)


def front_of(details: Mapping[str, Any], application: str) -> Mapping[str, Any]:
    """The part of Serve's instance details about the Ingress; empty where there is none."""
    found: Mapping[str, Any] = (
        details.get("applications", {}).get(application, {}).get("deployments", {}).get(FRONT, {})
    )
    return found


def is_updating(front: Mapping[str, Any]) -> bool:
    """Whether Serve is starting replicas of it, or has not taken old ones out of use yet.

    Not its status: that stays "UPDATING" until the last stream of an old replica has ended.
    """
    states = _states(front)
    return states["STARTING"] > 0 or states["RUNNING"] > front.get("target_num_replicas", 0)


def is_leaving(front: Mapping[str, Any]) -> bool:
    """Whether replicas of it are stopping: they may have been in use a moment ago."""
    return _states(front)["STOPPING"] > 0


def _states(front: Mapping[str, Any]) -> Counter[str]:
    return Counter(str(replica.get("state", "")) for replica in front.get("replicas", ()))

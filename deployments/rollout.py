"""The order of a rollout: the new front and the new experts first, then the new routers.

Serve replaces every deployment for itself: when the first new router runs, the old ones get no new requests. An old
Ingress that still takes requests then, with another tokenizer, would find nobody who understands them. So a new router
runs only when Serve has replaced the Ingress. The other way round nothing is lost: what a new Ingress asks waits.
Where Serve has given up on the new Ingress the new router cannot start either, and what ran before goes on.

A new router without its experts would take all new requests and answer none. So while routers of another model answer
it does not run before its own experts are ready, however long they take, have no room, or fail to load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cluster.errors import ConfigError
from deployments.targets import serve_details

logger = logging.getLogger(__name__)

FRONT, ROUTERS = "Ingress", "Router"
PATIENCE_S = 60.0
ASK_EVERY_S = 0.5
UNHEARD_S = 6.0
SETTLE_S = 0.5
"""Until the proxies have heard of the change."""


async def wait_for_front(
    application: str,
    *,
    details: Callable[[], Awaitable[Mapping[str, Any]]] = serve_details,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Wait until Serve is done with replacing the Ingress of `application`, `PATIENCE_S` at most.

    details: fetches Serve's instance details. Where nobody answers the router goes on: better a request refused than no
    router at all.

    Raises:
        ConfigError: Serve has given up on the new Ingress, while routers run that understand the old one.
    """
    give_up_at = clock() + PATIENCE_S
    while clock() < give_up_at:
        try:
            async with asyncio.timeout(PATIENCE_S):
                told = await details()
        except Exception as error:
            logger.warning("Serve does not say how far the Ingress is, this router does not wait for it: %r", error)
            return
        front = front_of(told, application)
        if (reason := given_up(front)) is not None and _states(_part(told, application, ROUTERS))["RUNNING"]:
            raise ConfigError(f"the Ingress of this version cannot start ({reason}); what ran before goes on.")
        if not is_updating(front, _deployed_s(told, application)):
            if is_leaving(front):
                await sleep(SETTLE_S)
            return
        await sleep(ASK_EVERY_S)
    logger.warning("the Ingress is not in place after %g s, this router does not wait for it any longer", PATIENCE_S)


async def wait_for_experts(
    application: str,
    lacking: Callable[[], Awaitable[tuple[int, Sequence[str]]]],
    *,
    details: Callable[[], Awaitable[Mapping[str, Any]]] = serve_details,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Wait until this router's own experts are ready, as long as routers of another model answer. Never raises.

    lacking: asks the Directory, see `DirectoryCore.lacking`. One that has just started has not heard of every router
    that Serve runs: it is given `UNHEARD_S`.
    """
    believe_at = clock() + UNHEARD_S
    said = False
    while True:
        missing: Sequence[str] = ()
        known = False
        try:
            running = _states(_part(await details(), application, ROUTERS))["RUNNING"]
            if not running:
                return
            heard, missing = await lacking()
            known = heard >= running
        except Exception as error:
            logger.warning("this router does not know yet whether its experts are ready: %r", error)
        if (known or clock() >= believe_at) and not missing:
            return
        if missing and not said:
            logger.info("this router waits for experts of its model: %s", ", ".join(missing))
            said = True
        await sleep(ASK_EVERY_S)


def front_of(details: Mapping[str, Any], application: str) -> Mapping[str, Any]:
    """The part of Serve's instance details about the Ingress; empty where there is none."""
    return _part(details, application, FRONT)


def is_updating(front: Mapping[str, Any], deployed_s: float = 0.0) -> bool:
    """Whether Serve is starting replicas of it, or has not taken old ones out of use yet.

    Not its status alone: that stays "UPDATING" until the last stream of an old replica has ended. But between two
    tries to start a new replica only that tells, with replicas in use from before `deployed_s`, Unix seconds.
    """
    states = _states(front)
    if states["STARTING"] > 0 or states["RUNNING"] > front.get("target_num_replicas", 0):
        return True
    running = [each for each in front.get("replicas", ()) if _word(each.get("state")) == "RUNNING"]
    return _word(front.get("status")) == "UPDATING" and any(
        each.get("start_time_s", deployed_s) < deployed_s for each in running
    )


def given_up(front: Mapping[str, Any]) -> str | None:
    """Why Serve tries no longer to start a new version of it: the error's own line; None while it does."""
    if _word(front.get("status")) != "DEPLOY_FAILED":
        return None
    lines = [line.strip() for line in str(front.get("message", "")).splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["see the log"])[-1]


def is_leaving(front: Mapping[str, Any]) -> bool:
    """Whether replicas of it are stopping: they may have been in use a moment ago."""
    return _states(front)["STOPPING"] > 0


def _part(details: Mapping[str, Any], application: str, deployment: str) -> Mapping[str, Any]:
    applications: Mapping[str, Any] = details.get("applications", {})
    found: Mapping[str, Any] = applications.get(application, {}).get("deployments", {}).get(deployment, {})
    return found


def _deployed_s(details: Mapping[str, Any], application: str) -> float:
    applications: Mapping[str, Any] = details.get("applications", {})
    return float(applications.get(application, {}).get("last_deployed_time_s") or 0.0)


def _states(front: Mapping[str, Any]) -> Counter[str]:
    return Counter(_word(replica.get("state", "")) for replica in front.get("replicas", ()))


def _word(value: Any) -> str:
    """Serve's enumerations are strings, but do not print as such."""
    return str(getattr(value, "value", value))

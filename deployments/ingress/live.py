"""The live picture: one event a second for everybody who watches, as server-sent events. Knows no Ray.

    viewers ──> Live ── while somebody watches ──> ask the cluster once a second ──> one event, made once ──> viewers

A viewer that reads slowly gets the newest event when it is ready for one, never those it has missed. While the
Directory is away events keep coming: they show what was last known, no rates, and a health that says who is missing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from cluster.errors import OverloadedError
from deployments.directory_client import background, cancel
from deployments.ingress.clients import ClusterClient, Health
from deployments.ingress.picture import Picture

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
STALE_S = 3.0
"""A cluster that has answered nothing for so long is away."""
MAX_VIEWERS = 32
"""Of one Ingress replica. Each costs one copy of every event on its way out, nothing else."""
LONGEST_S = 600.0
"""A stream ends then, and its viewer asks again: a new Ingress replica gets its share of them."""
RETRY = b"retry: 1000\n\n"
AWAY = Health(("directory",))


async def stays() -> bool:
    """Of a replica that nobody tells to stop."""
    return False


class Live:
    """The sampler of one Ingress replica, and its viewers. All methods belong to one asyncio loop.

    leaving: asked once a second; True ends all streams, because this replica is to stop and waits for them.
    """

    def __init__(
        self,
        cluster: ClusterClient,
        *,
        leaving: Callable[[], Awaitable[bool]] = stays,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._leaving = leaving
        self._period_s = period_s
        self._clock = clock
        self._wall = wall
        self._viewers = 0
        self._work: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._number = 0
        self._event = b""
        self._ended = False

    @property
    def viewers(self) -> int:
        """Streams that are open."""
        return self._viewers

    def enter(self) -> None:
        """Take a place; to be given back by `leave`.

        Raises:
            OverloadedError: `MAX_VIEWERS` watch already.
        """
        if self._viewers >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} viewers watch this server already; try again in a moment.")
        self._viewers += 1
        if self._work is None or self._work.done():
            self._ended = False
            # In a context of its own: its calls are no part of the request that happened to come first.
            self._work = background(self._run())

    async def leave(self) -> None:
        """Give the place back. With the last one the sampler ends."""
        self._viewers -= 1
        if self._viewers == 0:
            work, self._work = self._work, None
            await cancel(work)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events from the next one on, for who has a place, until this replica stops or `LONGEST_S` are over."""
        until_s, seen = self._clock() + LONGEST_S, self._number
        yield RETRY
        while self._clock() < until_s:
            await self._news(seen)
            if self._ended:
                return
            seen, event = self._number, self._event
            yield event

    async def _news(self, seen: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended or self._number > seen)

    async def _run(self) -> None:
        picture = Picture()
        poll: asyncio.Task[None] | None = None
        heard_s = self._clock()
        known = False
        try:
            while not self._ended:
                due_s = self._clock() + self._period_s
                poll = poll or background(self._poll(picture))
                await asyncio.wait({poll}, timeout=self._period_s)
                if poll.done():
                    known = poll.exception() is None
                    heard_s = self._clock() if known else heard_s
                    poll = None
                away = not known or self._clock() - heard_s > STALE_S
                await self._publish(picture.shown(self._wall(), AWAY if away else None))
                await asyncio.sleep(max(0.0, due_s - self._clock()))
        except Exception:
            logger.exception("the live picture cannot be made; its streams end")
        finally:
            if poll is not None and not poll.done():
                await cancel(poll)
            # Not where the last viewer has left: one who came meanwhile has a sampler of its own.
            if self._work is asyncio.current_task():
                await self._end()

    async def _poll(self, picture: Picture) -> None:
        """Ask everything there is to know. Raises whatever the cluster raises."""
        if await self._leaving():
            await self._end()
            return
        health, cluster, loads = await asyncio.gather(
            self._cluster.health(), self._cluster.snapshot(), self._cluster.loads()
        )
        picture.take(self._clock(), health, cluster, loads)

    async def _publish(self, shown: dict[str, Any]) -> None:
        async with self._changed:
            # Rising over restarts and replicas, too, as long as clocks go right.
            self._number = max(self._number + 1, int(1e3 * shown["time"]))
            self._event = f"id: {self._number}\ndata: {json.dumps(shown, separators=(',', ':'))}\n\n".encode()
            self._changed.notify_all()

    async def _end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

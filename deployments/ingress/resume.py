"""A request outlives its router: when one goes away, another continues after the tokens already delivered.

Sampling noise is a function of (seed, choice, position) and greedy choice needs none, so what follows is what would
have followed. Several choices that ran together on the lost router are resumed one by one, side by side. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from itertools import count

from cluster.errors import DeadlineError, OverloadedError, RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.clients import RouterClient
from deployments.ingress.errors import ClientGoneError

logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""Routers a request may lose before it is given up: more losses are a defect that retries would only spread."""


class ResumingRouter:
    """A `RouterClient` over another one, with the same contract but for RouterStoppingError, which becomes rare.

    clock: seconds, monotonic. pause_s: between two attempts, so that a broken cluster is not hammered.
    on_loss: told of each router that a request outlives.
    """

    def __init__(
        self,
        router: RouterClient,
        *,
        clock: Callable[[], float],
        pause_s: float = 0.2,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._router = router
        self._clock = clock
        self._pause_s = pause_s
        self._on_loss = on_loss

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of every choice until each has a finish reason; see `RouterClient`.

        Raises:
            RouterStoppingError: `ATTEMPTS` routers went away. DeadlineError: the time was up before one took over.
            OverloadedError: the first router asked was full; a request that has lost a router waits instead.
            ClientGoneError: Serve cancelled the call to a router that had taken over.
        """
        give_up_at = None if request.timeout_s is None else self._clock() + request.timeout_s
        progress = _Progress(request)
        stream = self._router.generate(request, session_id)
        try:
            losses = 0
            for attempt in count(1):
                try:
                    async for chunk in stream:
                        yield progress.note(chunk)
                    return
                except RouterStoppingError:
                    if progress.finished:
                        return
                    losses += 1
                    if losses == ATTEMPTS:
                        raise
                    logger.warning("a router went away; request %s goes on elsewhere", request.request_id)
                    self._on_loss()
                except OverloadedError:
                    # A request that was accepted once is not turned away: it asks until there is room.
                    if not losses:
                        raise
                await stream.aclose()
                await asyncio.sleep(self._pause_s)
                parts = progress.remaining(attempt, self._time_left(request, give_up_at))
                stream = _merged([self._router.generate(part, session_id) for part in parts])
        finally:
            await stream.aclose()

    def _time_left(self, request: GenerationRequest, give_up_at: float | None) -> float | None:
        if give_up_at is None:
            return None
        left_s = give_up_at - self._clock()
        if left_s <= 0:
            raise DeadlineError(f"The request did not finish within {request.timeout_s:g} s.")
        return left_s


@dataclass
class _Progress:
    """What has been delivered of a request: tokens per choice, and which choices have ended."""

    request: GenerationRequest
    delivered: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    @property
    def _choices(self) -> range:
        first = self.request.choice if self.request.sampling.n == 1 else 0
        return range(first, first + self.request.sampling.n)

    @property
    def finished(self) -> bool:
        """Whether every choice has a finish reason."""
        return len(self.ended) == len(self._choices)

    def note(self, chunk: TokenChunk) -> TokenChunk:
        """Remember the chunk, and whose it is: one stream has the tokens of one model, whatever is rolled out.

        A resumed choice does not report reused prompt tokens a second time.
        """
        if chunk.digest:
            self.request = replace(self.request, digest=chunk.digest)
        before = self.delivered.setdefault(chunk.choice, [])
        if before:
            chunk = replace(chunk, cached_tokens=0)
        before += chunk.tokens
        if chunk.finish_reason is not None:
            self.ended.add(chunk.choice)
        return chunk

    def remaining(self, attempt: int, timeout_s: float | None) -> list[GenerationRequest]:
        """One request for each choice that has not ended, to continue after its delivered tokens."""
        one = replace(self.request.sampling, n=1)
        return [
            replace(
                self.request,
                request_id=f"{self.request.request_id}/{attempt}.{choice}",
                tokens=self.request.tokens + tuple(self.delivered.get(choice, ())),
                sampling=one,
                timeout_s=timeout_s,
                choice=choice,
                accepted=True,
            )
            for choice in self._choices
            if choice not in self.ended
        ]


async def _merged(streams: list[AsyncGenerator[TokenChunk, None]]) -> AsyncGenerator[TokenChunk, None]:
    """Chunks of all streams as they come. The first error ends them all, after the chunks that came before it."""
    arrived: asyncio.Queue[TokenChunk | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[TokenChunk, None]) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait(chunk)
            arrived.put_nowait(None)
        except asyncio.CancelledError:
            arrived.put_nowait(ClientGoneError())  # Serve's doing; where it is ours, below, nobody reads it
            raise
        except Exception as error:
            arrived.put_nowait(error)
        finally:
            await stream.aclose()

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

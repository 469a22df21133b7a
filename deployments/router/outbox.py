"""The way of chunks from the engine's thread to one asyncio consumer, merging what the consumer is late to take.

Knows no queue length: what waits is at most one chunk per choice, and a request's tokens are bounded. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from deployments.generation import GenerationRequest, TokenChunk


class EngineLike(Protocol):
    """What `generate` needs of an engine; see `Engine`."""

    def submit(self, request: GenerationRequest, emit: Outbox) -> None:
        """Accept the request or raise; then call `emit` with chunks, and at most once, last, with an exception."""

    def cancel(self, request_id: str) -> None:
        """Drop the request if it is still alive."""


class Outbox:
    """Chunks of one request with `choices` choices. Called with items from any thread; iterated on the loop's thread.

    The iteration ends when every choice has a finish reason, or raises the exception put last, after the chunks that
    came before it. Cancelling a waiting `__anext__` loses nothing.
    """

    def __init__(self, choices: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._pending: dict[int, TokenChunk] = {}
        self._error: Exception | None = None
        self._open = choices

    def __call__(self, item: TokenChunk | Exception) -> None:
        """Put an item; never blocks."""
        with self._lock:
            wake = not self._pending and self._error is None
            if isinstance(item, Exception):
                self._error = item
            else:
                earlier = self._pending.get(item.choice)
                self._pending[item.choice] = item if earlier is None else merge(earlier, item)
        if wake:
            # The loop is closed when the consumer's process is on its way out: nobody is left to read.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    @property
    def ended(self) -> bool:
        """Whether everything there is has been taken."""
        return self._open == 0

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        while self._open:
            chunk = self._take()
            if chunk is not None:
                return chunk
            await self._arrived.wait()
        raise StopAsyncIteration

    def _take(self) -> TokenChunk | None:
        with self._lock:
            if self._pending:
                chunk = self._pending.pop(next(iter(self._pending)))
                self._open -= chunk.finish_reason is not None
                return chunk
            self._arrived.clear()
            if self._error is not None:
                self._open = 0
                raise self._error
            return None


def merge(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    """Two consecutive chunks of one choice as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return replace(first, tokens=first.tokens + second.tokens, logprobs=logprobs, finish_reason=second.finish_reason)


async def generate(engine: EngineLike, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
    """Chunks of a request as they come; closing or cancelling the iteration cancels the request.

    Raises:
        ExpertScaleError: what `Engine.submit` raises, or what the engine ends the request with.
    """
    outbox = Outbox(request.sampling.n)
    engine.submit(request, outbox)
    try:
        async for chunk in outbox:
            yield chunk
    finally:
        if not outbox.ended:
            engine.cancel(request.request_id)

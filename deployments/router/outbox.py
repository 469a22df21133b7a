"""The way of chunks from the engine's thread to one asyncio consumer, merging what comes before its next message.

Knows no queue length: what waits is at most one chunk per choice, and a request's tokens are bounded. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from deployments.generation import GenerationRequest, Pulse, TokenChunk, union
from deployments.router.pace import Pace

PULSE_S = 1.0
"""Silence after which a stream says that its router lives."""
NOBODY = Pulse("")


class EngineLike(Protocol):
    """What `generate` needs of an engine; see `Engine`."""

    @property
    def responsive(self) -> bool:
        """Whether its thread gets on."""

    def submit(self, request: GenerationRequest, emit: Outbox) -> None:
        """Accept the request or raise; then call `emit` with chunks, and at most once, last, with an exception."""

    def cancel(self, request_id: str) -> None:
        """Drop the request if it is still alive."""


class Outbox:
    """Chunks of one request with `choices` choices. Called with items from any thread; iterated on the loop's thread.

    pace: how long after one burst, a chunk of each choice that has any, the next may be; None for no limit. The first
    and the last chunk of a choice and an error never wait.

    The iteration ends when every choice has a finish reason, or raises the exception put last, after the chunks that
    came before it. Cancelling a waiting `__anext__` loses nothing.
    """

    def __init__(self, choices: int, pace: Pace | None = None) -> None:
        self._pace = pace
        self._not_before_s = 0.0
        self._burst = 0  # chunks of it that have not been taken yet
        self._pausing = False
        self._begun: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._pending: dict[int, TokenChunk] = {}
        self._error: Exception | None = None
        self._open = choices

    def __call__(self, item: TokenChunk | Exception) -> None:
        """Put an item; never blocks."""
        with self._lock:
            wake = not self._pending and self._error is None and not self._pausing
            if isinstance(item, Exception):
                self._error = item
                wake = True
            else:
                wake = wake or self._is_urgent(item)
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
            alarm = self._loop.call_at(self._not_before_s, self._arrived.set) if self._pausing else None
            try:
                await self._arrived.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        raise StopAsyncIteration

    def _take(self) -> TokenChunk | None:
        """A chunk that may go now; None where the consumer has to wait for `_arrived`."""
        with self._lock:
            if not self._burst:
                self._begin_burst()
            if self._burst:
                # What came since the burst began stands behind it.
                self._burst -= 1
                chunk = self._pending.pop(next(iter(self._pending)))
                self._open -= chunk.finish_reason is not None
                return chunk
            self._arrived.clear()
            if self._pausing:
                return None
            if self._error is not None:
                self._open = 0
                raise self._error
            return None

    def _begin_burst(self) -> None:
        now_s = self._loop.time()
        urgent = self._error is not None or any(map(self._is_urgent, self._pending.values()))
        self._pausing = now_s < self._not_before_s and not urgent
        if self._pending and not self._pausing:
            self._burst = len(self._pending)
            self._begun |= self._pending.keys()
            if self._pace is not None:
                self._not_before_s = now_s + self._pace.interval_s

    def _is_urgent(self, chunk: TokenChunk) -> bool:
        return chunk.finish_reason is not None or chunk.choice not in self._begun


def merge(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    """Two consecutive chunks of one choice as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return replace(
        first,
        tokens=first.tokens + second.tokens,
        logprobs=logprobs,
        finish_reason=second.finish_reason,
        experts=union(first.experts, second.experts),
    )


async def generate(
    engine: EngineLike, request: GenerationRequest, pace: Pace | None = None, *, pulse: Pulse = NOBODY
) -> AsyncIterator[TokenChunk | Pulse]:
    """Chunks of a request as `pace` lets them go; closing or cancelling the iteration cancels the request.

    `pulse` first, and again wherever `PULSE_S` pass without a chunk; none while the engine does not get on.

    Raises:
        ExpertScaleError: what `Engine.submit` raises, or what the engine ends the request with.
    """
    outbox = Outbox(request.sampling.n, pace)
    engine.submit(request, outbox)
    if pace is not None:
        pace.enter(request.sampling.n)
    try:
        chunk: TokenChunk | None = None
        while not outbox.ended:
            if chunk is None and engine.responsive:
                yield pulse
            try:
                async with asyncio.timeout(PULSE_S):
                    chunk = await anext(outbox)
            except TimeoutError:
                chunk = None
            else:
                yield chunk
    finally:
        if pace is not None:
            pace.leave(request.sampling.n)
        if not outbox.ended:
            engine.cancel(request.request_id)

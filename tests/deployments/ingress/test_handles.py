"""Errors of Ray become ours, so that clients see a status and a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from cluster.errors import ExpertsUnavailableError, OverloadedError, RequestError, RouterStoppingError
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.ingress.handles import RouterHandle, translated

REQUEST = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=2, seed=0), prompt_tokens=2)


def from_router(cause: Exception) -> Exception:
    """What Ray raises where the router raised `cause`."""
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


def test_what_the_router_raised_arrives_with_its_fields() -> None:
    error = translated(from_router(RequestError("Too long.", "messages", "context_length_exceeded")))
    assert type(error) is RequestError
    assert (str(error), error.param, error.code) == ("Too long.", "messages", "context_length_exceeded")
    assert type(translated(from_router(ExpertsUnavailableError("experts-2 is gone")))) is ExpertsUnavailableError


def test_a_full_queue_is_overload_and_a_dead_router_retryable() -> None:
    assert isinstance(translated(BackPressureError(1, 1)), OverloadedError)
    assert isinstance(translated(ActorDiedError()), RouterStoppingError)


def test_an_unknown_error_stays_what_it_is() -> None:
    error = KeyError("x")
    assert translated(error) is error


class FakeStream:
    """A handle's response: yields its items, then raises or ends; knows whether it was cancelled."""

    def __init__(self, items: list[TokenChunk], error: Exception | None = None) -> None:
        self.items, self.error, self.cancelled = items, error, False

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        for item in self.items:
            yield item
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.asked: dict[str, Any] = {}

    def options(self, **options: Any) -> FakeHandle:
        self.asked |= options
        return self

    def remote(self, request: GenerationRequest) -> FakeStream:
        self.asked["request"] = request
        return self.stream


def test_closing_early_cancels_the_call_and_ending_does_not() -> None:
    chunks = [TokenChunk(0, (5,)), TokenChunk(0, (6,), finish_reason="length")]

    async def read(limit: int) -> FakeHandle:
        handle = FakeHandle(FakeStream(chunks))
        stream = RouterHandle(handle).generate(REQUEST, "s")
        for _ in range(limit):
            await anext(stream, None)
        await stream.aclose()
        return handle

    early, ended = asyncio.run(read(1)), asyncio.run(read(3))
    assert early.stream.cancelled
    assert not ended.stream.cancelled
    assert early.asked == {"stream": True, "method_name": "generate", "session_id": "s", "request": REQUEST}


def test_an_error_in_the_stream_is_translated() -> None:
    async def read() -> None:
        async for _ in RouterHandle(FakeHandle(FakeStream([], from_router(OverloadedError("full"))))).generate(
            REQUEST, None
        ):
            pass

    with pytest.raises(OverloadedError, match="full"):
        asyncio.run(read())

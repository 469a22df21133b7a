"""An answer is continued by routers of the model that began it, and by no others. Milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from cluster.errors import RouterStoppingError
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.ingress.resume import ResumingRouter


class Routers:
    """The first call ends after `before` chunks, the first of which names the model; the others run to their end."""

    def __init__(self, before: int) -> None:
        self._before: int | None = before
        self.asked: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        assert session_id == "s"
        self.asked.append(request)
        before, self._before = self._before, None
        for position in range(4):
            if position == before:
                raise RouterStoppingError("gone")
            yield TokenChunk(0, (position,), None, "length" if position == 3 else None, digest="" if position else "ab")


def digests(before: int) -> list[str]:
    """Those that the calls asked for."""

    async def read() -> None:
        resuming: Any = ResumingRouter(routers, clock=lambda: 0.0, pause_s=0)
        async for _ in resuming.generate(request, "s"):
            pass

    routers = Routers(before)
    request = GenerationRequest("r", (1,), SamplingParams(max_tokens=4, seed=0), 1)
    asyncio.run(read())
    return [each.digest for each in routers.asked]


def test_once_tokens_are_delivered_only_their_model_may_go_on() -> None:
    assert digests(before=2) == ["", "ab"]


def test_a_request_that_has_no_tokens_yet_may_begin_with_any_model() -> None:
    assert digests(before=0) == ["", ""]

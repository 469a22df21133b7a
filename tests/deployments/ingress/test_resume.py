"""A request whose router goes away continues on another one, with the tokens it would have had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from cluster.errors import DeadlineError, EngineError, OverloadedError, RouterStoppingError
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.ingress.errors import ClientGoneError
from deployments.ingress.resume import ATTEMPTS, ResumingRouter


def request(n: int = 1, max_tokens: int = 6, timeout_s: float | None = None) -> GenerationRequest:
    return GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=max_tokens, seed=5, n=n), 3, timeout_s)


@dataclass
class Routers:
    """Token p of choice c is 100 * c + p, whoever computes it. Each entry of `losses` ends one call after that many
    chunks; the next `full` calls find the queues full; calls beyond run to their end."""

    losses: list[int] = field(default_factory=list)
    full: int = 0
    error: Exception = field(default_factory=lambda: RouterStoppingError("gone"))
    asked: list[GenerationRequest] = field(default_factory=list)
    closed: int = 0

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        assert session_id == "s"
        self.asked.append(request)
        lost_after = self.losses.pop(0) if self.losses else None
        if lost_after is None and self.full:
            self.full -= 1
            raise OverloadedError("full")
        try:
            for sent, chunk in enumerate(self._chunks(request)):
                if sent == lost_after:
                    raise self.error
                await asyncio.sleep(0)
                yield chunk
            if lost_after is not None:
                raise self.error
        finally:
            self.closed += 1

    def _chunks(self, request: GenerationRequest) -> list[TokenChunk]:
        sampling = request.sampling
        first = request.choice if sampling.n == 1 else 0
        done = len(request.tokens) - request.prompt_tokens
        return [
            TokenChunk(c, (100 * c + p,), None, "length" if p + 1 == sampling.max_tokens else None, 2 * (p == done))
            for p in range(done, sampling.max_tokens)
            for c in range(first, first + sampling.n)
        ]


def run(routers: Routers, asked: GenerationRequest) -> list[TokenChunk]:
    async def read() -> list[TokenChunk]:
        resuming = ResumingRouter(routers, clock=lambda: 0.0, pause_s=0)
        return [chunk async for chunk in resuming.generate(asked, "s")]

    return asyncio.run(read())


def tokens(chunks: list[TokenChunk], choice: int = 0) -> list[int]:
    return [token for chunk in chunks if chunk.choice == choice for token in chunk.tokens]


@pytest.mark.parametrize("losses", [[], [0], [1], [5], [2, 0, 3], [6]])
def test_one_choice_gets_every_token_once_however_often_routers_go(losses: list[int]) -> None:
    routers = Routers(losses=losses)
    chunks = run(routers, request())
    assert tokens(chunks) == list(range(6))
    assert [chunk.finish_reason for chunk in chunks].count("length") == 1
    assert sum(chunk.cached_tokens for chunk in chunks) == 2
    assert len({asked.request_id for asked in routers.asked}) == len(routers.asked) == routers.closed
    assert all(asked.sampling.max_tokens == 6 and asked.prompt_tokens == 3 for asked in routers.asked)


def test_a_request_whose_router_is_lost_waits_where_the_others_are_full() -> None:
    """It was accepted: a full queue is an answer to a new request only."""
    routers = Routers(losses=[2], full=ATTEMPTS + 3)
    assert tokens(run(routers, request())) == list(range(6))
    assert len({asked.request_id for asked in routers.asked}) == len(routers.asked) == 2 + ATTEMPTS + 3


def test_a_new_request_is_told_that_the_queues_are_full() -> None:
    routers = Routers(error=OverloadedError("full"), losses=[0])
    with pytest.raises(OverloadedError):
        run(routers, request())
    assert len(routers.asked) == 1


def test_a_resumed_call_that_serve_cancels_ends_the_request() -> None:
    class Cancelling(Routers):
        async def generate(
            self, request: GenerationRequest, session_id: str | None
        ) -> AsyncGenerator[TokenChunk, None]:
            if self.asked:
                raise asyncio.CancelledError
            async for chunk in super().generate(request, session_id):
                yield chunk

    async def read() -> None:
        async with asyncio.timeout(5):
            stream = ResumingRouter(Cancelling(losses=[1]), clock=lambda: 0.0, pause_s=0).generate(request(), "s")
            async for _ in stream:
                pass

    with pytest.raises(ClientGoneError):
        asyncio.run(read())


@pytest.mark.parametrize("loss", range(18))
def test_several_choices_are_resumed_each_on_its_own(loss: int) -> None:
    routers = Routers(losses=[loss])
    chunks = run(routers, request(n=3))
    for choice in range(3):
        assert tokens(chunks, choice) == [100 * choice + position for position in range(6)]
    assert all(asked.sampling.n == 1 for asked in routers.asked[1:])


def test_a_loss_among_resumed_choices_is_survived_too() -> None:
    chunks = run(Routers(losses=[4, 1, 2]), request(n=3))
    for choice in range(3):
        assert tokens(chunks, choice) == [100 * choice + position for position in range(6)]


def test_after_too_many_losses_it_gives_up() -> None:
    routers = Routers(losses=[0] * ATTEMPTS)
    with pytest.raises(RouterStoppingError):
        run(routers, request())
    assert len(routers.asked) == ATTEMPTS


def test_other_errors_are_not_retried() -> None:
    routers = Routers(losses=[2], error=EngineError("broken"))
    with pytest.raises(EngineError):
        run(routers, request())
    assert len(routers.asked) == 1


def test_the_deadline_covers_all_attempts() -> None:
    times = iter([0.0, 7.0, 20.0])

    async def read() -> None:
        async for _ in ResumingRouter(routers, clock=lambda: next(times), pause_s=0).generate(asked, "s"):
            pass

    routers, asked = Routers(losses=[1, 1]), request(timeout_s=10.0)
    with pytest.raises(DeadlineError, match="within 10 s"):
        asyncio.run(read())
    assert [each.timeout_s for each in routers.asked] == [10.0, 3.0]


def test_closing_closes_what_runs() -> None:
    routers = Routers(losses=[3])

    async def read() -> None:
        stream = ResumingRouter(routers, clock=lambda: 0.0, pause_s=0).generate(request(n=2), "s")
        for _ in range(5):
            await anext(stream)
        await stream.aclose()

    asyncio.run(read())
    assert routers.closed == len(routers.asked) == 3


@pytest.mark.parametrize("losses", [[], [1], [2, 0, 3]])
def test_each_router_a_request_outlives_is_told_once_however_long_the_others_are_full(losses: list[int]) -> None:
    told: list[None] = []

    async def read() -> None:
        resuming = ResumingRouter(
            Routers(losses=list(losses), full=2 if losses else 0),
            clock=lambda: 0.0,
            pause_s=0,
            on_loss=lambda: told.append(None),
        )
        async for _ in resuming.generate(request(), "s"):
            pass

    asyncio.run(read())
    assert len(told) == len(losses)

"""Errors of Ray become ours, so that clients see a status and a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from cluster.errors import ExpertsUnavailableError, OverloadedError, RequestError, RouterStoppingError
from deployments.generation import GenerationRequest, Pulse, SamplingParams, TokenChunk
from deployments.ingress.handles import RouterHandle, translated
from deployments.ingress.resume import ResumingRouter
from deployments.whereabouts import Whereabouts
from tests import virtual_time

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
        stream = RouterHandle(handle, silence_s=5).generate(REQUEST, "s")
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
        handle = FakeHandle(FakeStream([], from_router(OverloadedError("full"))))
        async for _ in RouterHandle(handle, silence_s=5).generate(REQUEST, None):
            pass

    with pytest.raises(OverloadedError, match="full"):
        asyncio.run(read())


PULSE = Pulse("a")
LAST = TokenChunk(0, (7,), finish_reason="length")


class TimedCall:
    """A call's answer: a number waits so many seconds, a function is called, `None` waits for ever, else an item."""

    def __init__(self, steps: tuple[object, ...]) -> None:
        self._steps = steps
        self.cancelled = False
        self.given_up = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            for step in self._steps:
                if step is None:
                    await asyncio.Event().wait()
                elif isinstance(step, int | float):
                    await asyncio.sleep(step)
                elif callable(step):
                    step()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        except asyncio.CancelledError:
            self.given_up = True
            raise

    def cancel(self) -> None:
        self.cancelled = True


class Calls:
    """A handle that answers with `make(request, known)`; keeps the calls."""

    def __init__(self, make: Callable[[GenerationRequest, Whereabouts], tuple[object, ...]]) -> None:
        self._make = make
        self.known = Whereabouts(lambda: asyncio.get_running_loop().time())
        self.calls: list[TimedCall] = []

    def options(self, **_: Any) -> Calls:
        return self

    def remote(self, request: GenerationRequest) -> TimedCall:
        self.calls.append(TimedCall(self._make(request, self.known)))
        return self.calls[-1]

    def router(self) -> RouterHandle:
        return RouterHandle(self, silence_s=5, whereabouts=self.known)


def heard(*steps: object, reader_s: float = 0) -> tuple[list[TokenChunk], float, str, Calls]:
    """(chunks, when it ended, the error, the handle) of one call that follows `steps`; "place" sends it to router a."""

    def make(_request: GenerationRequest, known: Whereabouts) -> tuple[object, ...]:
        moves = {"place": lambda: known.place("r", "a"), "withdraw": lambda: known.withdraw("r")}
        return tuple(moves.get(step, step) if isinstance(step, str) else step for step in steps)

    handle = Calls(make)

    async def read() -> tuple[list[TokenChunk], float, str, Calls]:
        chunks, error = [], ""
        try:
            async for chunk in handle.router().generate(REQUEST, None):
                chunks.append(chunk)
                await asyncio.sleep(reader_s)
        except RouterStoppingError as stopping:
            error = str(stopping)
            assert handle.known.suspects() == {"a"}
        else:
            assert not handle.known.suspects()
        at_s = asyncio.get_running_loop().time()
        assert handle.known.placed("r") is None
        await asyncio.sleep(0.001)
        assert handle.calls[0].given_up == bool(error) or "went away" in error
        return chunks, at_s, error, handle

    return virtual_time.run(read())


def test_signs_of_life_are_for_the_ingress_only() -> None:
    chunks, at_s, error, _ = heard("place", PULSE, 4, PULSE, 4, PULSE, 4.9, LAST)
    assert (chunks, round(at_s, 3), error) == ([LAST], 12.9, "")


@pytest.mark.parametrize(
    ("steps", "silent_at_s"),
    [
        (("place", None), 5),
        ((2, "place", None), 7),
        (("place", PULSE, None), 5),
        (("place", PULSE, 3, TokenChunk(0, (5,)), None), 8),
        (("place", PULSE, 3, PULSE, 6, LAST), 8),
    ],
    ids=["never accepted", "sent late", "accepted", "in the middle", "too late"],
)
def test_a_router_that_is_silent_too_long_hangs_and_its_call_is_given_up(
    steps: tuple[object, ...], silent_at_s: float
) -> None:
    chunks, at_s, error, handle = heard(*steps)
    assert (round(at_s, 3), error) == (silent_at_s, "The router a has been silent for 5 s.")
    assert LAST not in chunks
    [call] = handle.calls
    assert call.cancelled


def test_a_call_that_waits_for_a_place_may_wait() -> None:
    chunks, _, error, _ = heard(1000, "place", 4, PULSE, LAST)
    assert (chunks, error) == ([LAST], "")


def test_a_call_that_a_router_refused_waits_again() -> None:
    chunks, _, error, _ = heard("place", 4, "withdraw", 60, "place", 4, PULSE, LAST)
    assert (chunks, error) == ([LAST], "")
    chunks, _, error, _ = heard(1, "place", 4.5, "withdraw", 60, "place", 4, PULSE, LAST)
    assert (chunks, error) == ([LAST], "")
    _, at_s, error, _ = heard("place", 4, "withdraw", 60, "place", None)
    assert at_s == 69
    assert error


def test_a_slow_reader_does_not_blame_the_router() -> None:
    chunks, _, error, _ = heard("place", PULSE, TokenChunk(0, (5,)), LAST, reader_s=60)
    assert (len(chunks), error) == (2, "")


def test_an_ingress_that_stood_still_itself_listens_again_before_it_judges() -> None:
    def stand_still() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual_time.VirtualLoop)
        loop.call_later(4.9, lambda: setattr(loop, "now", loop.now + 60))

    chunks, _, error, _ = heard("place", PULSE, stand_still, 5.5, LAST)
    assert (chunks, error) == ([LAST], "")


def test_a_dead_router_is_avoided_and_one_that_refuses_is_not() -> None:
    *_, error, _ = heard("place", PULSE, ActorDiedError())
    assert "went away" in error

    async def refused() -> frozenset[str]:
        handle = Calls(lambda _, known: (lambda: known.place("r", "a"), RouterStoppingError("stopping")))
        with pytest.raises(RouterStoppingError):
            await anext(handle.router().generate(REQUEST, None))
        return handle.known.suspects()

    assert virtual_time.run(refused()) == frozenset()


@pytest.mark.parametrize("tokens_before", range(5))
def test_a_stream_goes_on_elsewhere_with_nothing_repeated_and_nothing_skipped(tokens_before: int) -> None:
    """Router a hangs after so many tokens and wakes later, with the rest; b serves who avoids a."""
    asked = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=6, seed=0), prompt_tokens=2)

    def make(request: GenerationRequest, known: Whereabouts) -> tuple[object, ...]:
        name = "b" if "a" in known.suspects() else "a"
        done = len(request.tokens) - request.prompt_tokens
        rest = [TokenChunk(0, (p,), finish_reason="length" if p == 5 else None) for p in range(done, 6)]
        place = lambda: known.place(request.request_id, name)  # noqa: E731
        if name == "a":
            return (place, Pulse("a"), *rest[:tokens_before], 30, *rest[tokens_before:])
        return (place, Pulse("b"), *rest)

    async def read() -> tuple[list[int], float, Calls]:
        handle = Calls(make)
        clock = asyncio.get_running_loop().time
        resuming = ResumingRouter(handle.router(), clock=clock)
        tokens = [token async for chunk in resuming.generate(asked, None) for token in chunk.tokens]
        at_s = clock()
        await asyncio.sleep(60)
        return tokens, at_s, handle

    tokens, at_s, handle = virtual_time.run(read())
    assert tokens == list(range(6))
    assert round(at_s, 3) == 5.2
    assert [call.cancelled for call in handle.calls] == [True, False]

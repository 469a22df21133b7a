"""Chunks cross from a thread to asyncio in order, merged when late, ended once. Milliseconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

import pytest

from cluster.errors import DeadlineError, OverloadedError
from deployments.generation import GenerationRequest, Pulse, TokenChunk, TokenLogprob
from deployments.router.outbox import Outbox, generate, merge
from deployments.router.pace import SHORTEST_S, Pace
from tests import virtual_time
from tests.deployments.router.fake_backbone import make_request

PULSE = Pulse("r1")
T = TypeVar("T")


def chunk(token: int, choice: int = 0, **fields: object) -> TokenChunk:
    return TokenChunk(choice, (token,), **fields)  # type: ignore[arg-type]


def last(token: int, choice: int = 0) -> TokenChunk:
    return chunk(token, choice, finish_reason="stop")


async def collect(outbox: AsyncIterator[T]) -> list[T]:
    return [item async for item in outbox]


def test_what_waits_is_merged_per_choice() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(2)
        for item in (chunk(1, 0, cached_tokens=4), chunk(7, 1), chunk(2, 0), last(3, 0), last(8, 1)):
            outbox(item)
        return await collect(outbox)

    assert asyncio.run(scenario()) == [
        TokenChunk(0, (1, 2, 3), None, "stop", 4),
        TokenChunk(1, (7, 8), None, "stop"),
    ]


def test_a_consumer_that_keeps_up_gets_every_chunk_by_itself() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(1)
        taken = []
        for item in (chunk(1), chunk(2), last(3)):
            waiting = asyncio.ensure_future(anext(outbox))
            await asyncio.sleep(0)
            outbox(item)
            taken.append(await waiting)
        return taken

    assert asyncio.run(scenario()) == [chunk(1), chunk(2), last(3)]


def test_log_probabilities_are_merged_in_order() -> None:
    first, second = TokenLogprob(1, -0.5), TokenLogprob(2, -1.5)
    assert merge(chunk(1, logprobs=(first,)), chunk(2, logprobs=(second,))).logprobs == (first, second)


def test_an_error_comes_after_the_chunks_before_it_and_ends() -> None:
    async def scenario() -> None:
        outbox = Outbox(1)
        outbox(chunk(1))
        outbox(DeadlineError("late"))
        assert await anext(outbox) == chunk(1)
        with pytest.raises(DeadlineError):
            await anext(outbox)
        assert outbox.ended
        assert await collect(outbox) == []

    asyncio.run(scenario())


def test_cancelling_a_waiting_consumer_loses_no_chunk() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(1)
        waiting = asyncio.ensure_future(anext(outbox))
        await asyncio.sleep(0)
        outbox(chunk(1))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        outbox(last(2))
        return await collect(outbox)

    assert asyncio.run(scenario()) == [TokenChunk(0, (1, 2), None, "stop")]


def test_nothing_is_lost_between_threads() -> None:
    count = 5000

    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(2)

        def produce(choice: int) -> None:
            for token in range(count):
                outbox(last(token, choice) if token == count - 1 else chunk(token, choice))

        threads = [threading.Thread(target=produce, args=(choice,)) for choice in range(2)]
        for thread in threads:
            thread.start()
        chunks = await collect(outbox)
        for thread in threads:
            thread.join()
        return chunks

    chunks = asyncio.run(scenario())
    for choice in range(2):
        assert [t for c in chunks if c.choice == choice for t in c.tokens] == list(range(count))


class Slow(Pace):
    """One message of a stream in so many seconds that a test which waited for the next one would fail."""

    @property
    def interval_s(self) -> float:
        return 3600.0


def test_the_first_and_the_last_chunk_of_a_paced_stream_go_at_once_and_those_between_together() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(1, Slow(1))
        outbox(chunk(1))
        taken = [await anext(outbox)]
        waiting = asyncio.ensure_future(anext(outbox))
        for token in (2, 3):
            await asyncio.sleep(0)
            outbox(chunk(token))
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox(last(4))
        return [*taken, await asyncio.wait_for(waiting, 5)]

    assert asyncio.run(scenario()) == [chunk(1), TokenChunk(0, (2, 3, 4), None, "stop")]


def test_an_error_does_not_wait_for_the_pace() -> None:
    async def scenario() -> None:
        outbox = Outbox(1, Slow(1))
        outbox(chunk(1))
        await anext(outbox)
        waiting = asyncio.ensure_future(anext(outbox))
        await asyncio.sleep(0)
        outbox(DeadlineError("late"))
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())


def test_all_choices_of_a_paced_stream_go_in_the_same_burst() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(2, Slow(1))
        outbox(chunk(1, 0))
        outbox(chunk(7, 1))
        return [await asyncio.wait_for(anext(outbox), 5) for _ in range(2)]

    assert asyncio.run(scenario()) == [chunk(1, 0), chunk(7, 1)]


def test_a_choice_that_is_faster_than_its_consumer_does_not_keep_a_burst_open() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(2, Slow(1))
        outbox(chunk(1, 0))
        outbox(chunk(7, 1))
        taken = [await anext(outbox)]
        outbox(chunk(2, 0))
        taken.append(await anext(outbox))
        waiting = asyncio.ensure_future(anext(outbox))
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox(last(3, 0))
        return [*taken, await asyncio.wait_for(waiting, 5)]

    assert asyncio.run(scenario()) == [chunk(1, 0), chunk(7, 1), TokenChunk(0, (2, 3), None, "stop")]


def test_the_first_chunk_of_every_choice_goes_at_once() -> None:
    async def scenario() -> list[TokenChunk]:
        outbox = Outbox(2, Slow(1))
        outbox(chunk(1, 0))
        taken = [await anext(outbox)]
        waiting = asyncio.ensure_future(anext(outbox))
        await asyncio.sleep(0)
        outbox(chunk(7, 1))
        return [*taken, await asyncio.wait_for(waiting, 5)]

    assert asyncio.run(scenario()) == [chunk(1, 0), chunk(7, 1)]


def test_a_paced_stream_goes_on_when_its_time_has_come() -> None:
    async def scenario() -> tuple[list[TokenChunk], float]:
        outbox = Outbox(1, Pace(1000))
        outbox(chunk(1))
        taken = [await anext(outbox)]
        started = asyncio.get_running_loop().time()
        outbox(chunk(2))
        taken.append(await asyncio.wait_for(anext(outbox), 5))
        return taken, asyncio.get_running_loop().time() - started

    taken, waited_s = asyncio.run(scenario())
    assert taken == [chunk(1), chunk(2)]
    assert waited_s > SHORTEST_S / 2


def test_an_item_for_a_closed_loop_is_dropped_quietly() -> None:
    async def scenario() -> Outbox:
        return Outbox(1)

    asyncio.run(scenario())(chunk(1))


class ScriptedEngine:
    """Emits `items` at once; records what is cancelled."""

    def __init__(self, *items: TokenChunk | Exception) -> None:
        self.items = items
        self.responsive = True
        self.cancelled: list[str] = []

    def submit(self, _: GenerationRequest, emit: Callable[[TokenChunk | Exception], None]) -> None:
        for item in self.items:
            emit(item)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def test_a_finished_generation_is_not_cancelled() -> None:
    engine = ScriptedEngine(chunk(1), last(2))

    async def scenario() -> list[TokenChunk | Pulse]:
        return await collect(generate(engine, make_request([1]), pulse=PULSE))

    assert asyncio.run(scenario()) == [PULSE, TokenChunk(0, (1, 2), None, "stop")]
    assert engine.cancelled == []


def test_a_consumer_that_leaves_cancels_the_request() -> None:
    engine = ScriptedEngine(chunk(1))

    async def leave_early() -> None:
        async with aclosing(generate(engine, make_request([1], "early"))) as chunks:
            assert [await anext(chunks), await anext(chunks)] == [Pulse(""), chunk(1)]

    async def leave_at_the_first_pulse() -> None:
        async with aclosing(generate(engine, make_request([1], "at once"))) as chunks:
            await anext(chunks)

    async def cancelled_while_waiting() -> None:
        task = asyncio.ensure_future(collect(generate(engine, make_request([1], "waiting"))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave_early())
    asyncio.run(leave_at_the_first_pulse())
    asyncio.run(cancelled_while_waiting())
    assert engine.cancelled == ["early", "at once", "waiting"]


def test_streams_count_for_the_pace_while_they_are_open() -> None:
    pace = Pace(chunks_per_s=10)

    async def scenario() -> list[float]:
        engine = ScriptedEngine(chunk(1))
        async with aclosing(generate(engine, make_request([1], "a"), pace)) as first:
            await anext(first)
            async with aclosing(generate(engine, make_request([1], "b"), pace)) as second:
                await anext(second)
                both = pace.interval_s
            return [both, pace.interval_s]

    assert asyncio.run(scenario()) == [0.2, 0.1]


def test_errors_of_the_engine_reach_the_consumer() -> None:
    async def scenario() -> None:
        await collect(generate(ScriptedEngine(OverloadedError("full")), make_request([1])))

    with pytest.raises(OverloadedError):
        asyncio.run(scenario())


def heard(engine: ScriptedEngine, *events: tuple[float, Callable[[Outbox], None]]) -> list[tuple[float, object]]:
    """(second, message) of a generation during which each of `events` happens at its second."""

    async def scenario() -> list[tuple[float, object]]:
        loop = asyncio.get_running_loop()

        def submit(_: GenerationRequest, emit: Outbox) -> None:
            for at_s, happen in events:
                loop.call_at(at_s, happen, emit)

        engine.submit = submit  # type: ignore[assignment, method-assign]
        return [(loop.time(), message) async for message in generate(engine, make_request([1]), pulse=PULSE)]

    return virtual_time.run(scenario())


def test_a_silent_stream_says_each_second_that_its_router_lives() -> None:
    said = heard(ScriptedEngine(), (2.5, lambda emit: emit(chunk(1))), (2.9, lambda emit: emit(last(2))))
    assert said == [(0, PULSE), (1, PULSE), (2, PULSE), (2.5, chunk(1)), (2.9, last(2))]


def test_a_stream_with_tokens_needs_no_pulse() -> None:
    events = [(0.9 * i, lambda emit: emit(chunk(1))) for i in range(1, 10)]
    said = heard(ScriptedEngine(), *events, (9.0, lambda emit: emit(last(2))))
    assert [message for _, message in said] == [PULSE, *[chunk(1)] * 9, last(2)]


def test_while_the_engine_hangs_there_is_silence_and_tokens_still_go() -> None:
    engine = ScriptedEngine()
    engine.responsive = False

    def mend(_: Outbox) -> None:
        engine.responsive = True

    said = heard(engine, (3.2, lambda emit: emit(chunk(1))), (5.7, mend), (6.5, lambda emit: emit(last(2))))
    assert said == [(3.2, chunk(1)), (6.2, PULSE), (6.5, last(2))]

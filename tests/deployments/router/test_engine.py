"""The engine over a fake model: right tokens whatever the batch, one end per request, no page left. About 5 s."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    DeadlineError,
    EngineError,
    ExpertsUnavailableError,
    OverloadedError,
    RequestError,
    RouterStoppingError,
)
from deployments.generation import GenerationRequest, TokenChunk
from deployments.router.engine import Engine
from deployments.router.outbox import generate
from deployments.router.step import StepInput
from tests.deployments.router.fake_backbone import (
    POISON,
    FakeBackbone,
    FakeClock,
    Inbox,
    expected,
    make_engine,
    make_request,
    run_until_idle,
    submit,
    turns,
)

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(1, 60) for _ in range(chance.randint(1, longest))] for _ in range(count)]


def test_one_request_gets_the_tokens_it_would_get_alone() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    request = make_request([5, 6, 7], max_tokens=20)
    inbox = submit(engine, request)
    run_until_idle(engine)
    assert inbox.result == expected(request, backbone)


def test_requests_that_join_while_others_run_get_their_own_tokens() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    requests = [make_request(p, f"r{i}", max_tokens=12) for i, p in enumerate(prompts(10))]
    inboxes = []
    for request in requests:
        inboxes.append(submit(engine, request))
        engine.turn()
    run_until_idle(engine)
    assert [inbox.result for inbox in inboxes] == [expected(request, backbone) for request in requests]
    assert max(len(step) for step in backbone.steps) == 4


def test_a_tiny_pool_preempts_and_still_gives_the_same_tokens_once() -> None:
    backbone = FakeBackbone(num_pages=10)
    engine = make_engine(backbone)
    requests = [
        make_request(p, f"r{i}", max_tokens=20, seed=i, **SAMPLED) for i, p in enumerate(prompts(8, longest=12))
    ]
    inboxes = [submit(engine, request) for request in requests]
    run_until_idle(engine)
    assert engine.stats().preemptions > 0
    assert [inbox.result for inbox in inboxes] == [expected(request, backbone) for request in requests]


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    request = make_request([9, 8, 7], max_tokens=15, seed=42, **SAMPLED)
    results = []
    for companions in range(4):
        engine = make_engine(FakeBackbone())
        for index, tokens in enumerate(prompts(companions, seed=companions)):
            submit(engine, make_request(tokens, f"other{index}", temperature=1.0, seed=index))
            engine.turn()
        inbox = submit(engine, request)
        run_until_idle(engine)
        results.append(inbox.result)
    assert results == [results[0]] * 4


def test_a_resume_continues_with_the_tokens_of_the_first_run() -> None:
    backbone = FakeBackbone()
    request = make_request([9, 8, 7], max_tokens=15, seed=42, presence_penalty=0.5, **SAMPLED)
    [(tokens, _)] = expected(request, backbone).values()
    engine = make_engine(backbone)
    resumed = make_request([9, 8, 7, *tokens[:6]], "again", 3, max_tokens=15, seed=42, presence_penalty=0.5, **SAMPLED)
    inbox = submit(engine, resumed)
    run_until_idle(engine)
    assert inbox.result == {0: (tokens[6:], "length")}


def test_choices_differ_share_the_prompt_and_can_be_resumed_alone() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    request = make_request(list(range(1, 15)), n=3, max_tokens=10, seed=7, **SAMPLED)
    inbox = submit(engine, request)
    run_until_idle(engine)
    assert inbox.result == expected(request, backbone)
    assert len({tuple(tokens) for tokens, _ in inbox.result.values()}) == 3
    assert [inbox.cached_tokens(choice) for choice in range(3)] == [0, 12, 12]
    third = inbox.result[2][0]
    alone = submit(
        engine, make_request([*range(1, 15), *third[:4]], "third", 14, choice=2, max_tokens=10, seed=7, **SAMPLED)
    )
    run_until_idle(engine)
    assert alone.result == {2: (third[4:], "length")}


def test_a_repeated_prompt_is_reused_and_reported() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    request = make_request(list(range(1, 14)))
    inboxes = []
    for _ in range(2):
        inboxes.append(submit(engine, request))
        run_until_idle(engine)
    assert [inbox.cached_tokens() for inbox in inboxes] == [0, 12]
    assert inboxes[0].result == inboxes[1].result
    stats = engine.stats()
    assert stats.cached_tokens == 12
    assert stats.prefill_tokens == 14
    assert stats.tokens_generated == 2 * len(inboxes[0].chunks)
    assert stats.kv_used_tokens == 0
    assert stats.kv_tokens == 256


def test_logprobs_come_with_every_token() -> None:
    engine = make_engine(FakeBackbone())
    inbox = submit(engine, make_request([1], logprobs=2))
    run_until_idle(engine)
    for chunk in inbox.chunks:
        assert chunk.logprobs is not None
        assert [entry.token for entry in chunk.logprobs] == list(chunk.tokens)
        assert chunk.logprobs[0].top[0][0] == chunk.tokens[0], "greedy takes the most probable"


def test_a_failed_step_fails_its_requests_only_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone, max_sequences=2)
    inboxes = [submit(engine, make_request([5, index], f"r{index}")) for index in range(1, 5)]
    engine.turn()

    def fail_once(_: StepInput) -> None:
        backbone.before_forward = None
        raise ZeroDivisionError

    backbone.before_forward = fail_once
    with caplog.at_level(logging.ERROR):
        run_until_idle(engine)
    assert [type(inbox.error) for inbox in inboxes] == [EngineError, EngineError, type(None), type(None)]
    assert inboxes[0].error is not inboxes[1].error
    for index in (3, 4):
        assert inboxes[index - 1].result == expected(make_request([5, index]), backbone)
    assert "a step of 2 tokens failed" in caplog.text


@pytest.mark.parametrize("error", [ZeroDivisionError(), ExpertsUnavailableError("experts-0 is missing")])
def test_a_failed_step_is_logged_under_the_ids_of_its_requests(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    for request_id, said in (("a-0", "one"), ("a-1", "one"), ("b-0", "two")):
        submit(engine, make_request([5], request_id, x_request_id=said))

    def fail(_: StepInput) -> None:
        raise error

    backbone.before_forward = fail
    with caplog.at_level(logging.WARNING):
        run_until_idle(engine)
    [record] = [record for record in caplog.records if "failed" in record.getMessage()]
    assert "a-0, a-1, b-0 (x-request-id one, two)" in record.getMessage(), "text shows no more than the message"
    assert vars(record)["request_ids"] == ["one", "two"]


def test_unavailable_experts_fail_the_step_with_that_error() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)

    def unavailable(_: StepInput) -> None:
        raise ExpertsUnavailableError("No replica of experts-1 answered.")

    backbone.before_forward = unavailable
    inbox = submit(engine, make_request([1, 2], n=3))
    run_until_idle(engine)
    assert isinstance(inbox.error, ExpertsUnavailableError)
    assert str(inbox.error) == "No replica of experts-1 answered."


def test_broken_logits_fail_one_request_and_its_pages_are_not_reused() -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    poisoned = make_request([1, 2, 3, 4, 5, POISON], "poisoned", n=2)
    healthy = make_request([1, 2, 3, 4, 5, 6], "healthy")
    broken, inbox = submit(engine, poisoned), submit(engine, healthy)
    run_until_idle(engine)
    assert isinstance(broken.error, EngineError)
    assert inbox.result == expected(healthy, backbone)
    engine = make_engine(backbone)
    submit(engine, poisoned)
    run_until_idle(engine)
    after = submit(engine, healthy)
    run_until_idle(engine)
    assert after.cached_tokens() == 0


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_cancelled_request_falls_silent_and_frees_its_pages_by_the_next_step(steps_before: int) -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)
    other = make_request([4, 4], "other", max_tokens=20, ignore_eos=True)
    cancelled = submit(engine, make_request(list(range(1, 30)), "cancelled", n=2, max_tokens=20, ignore_eos=True))
    inbox = submit(engine, other)
    for _ in range(steps_before):
        engine.turn()
    emitted = len(cancelled.chunks)
    engine.cancel("cancelled")
    engine.turn()
    assert engine.stats().kv_used_tokens <= 8
    run_until_idle(engine)
    assert len(cancelled.chunks) == emitted
    assert not cancelled.ended
    assert inbox.result == expected(other, backbone)


def test_cancelling_what_is_not_there_does_nothing() -> None:
    engine = make_engine(FakeBackbone())
    engine.cancel("nobody")
    inbox = submit(engine, make_request([1]))
    run_until_idle(engine)
    engine.cancel("r")
    assert inbox.ended
    engine.check_idle()


def test_an_id_can_be_used_again_after_its_end_but_not_before() -> None:
    engine = make_engine(FakeBackbone())
    submit(engine, make_request([1]))
    with pytest.raises(EngineError, match="still running"):
        submit(engine, make_request([2]))
    engine.cancel("r")
    second = submit(engine, make_request([2]))
    run_until_idle(engine)
    assert second.error is None
    assert second.ended


def test_deadlines_end_running_and_waiting_requests() -> None:
    clock = FakeClock()
    engine = make_engine(FakeBackbone(), clock, max_sequences=1)
    running = submit(engine, make_request([1], "a", timeout_s=5, max_tokens=50, ignore_eos=True))
    waiting = submit(engine, make_request([2], "b", timeout_s=6, max_tokens=50, ignore_eos=True))
    patient = submit(engine, make_request([3], "c", max_tokens=3, ignore_eos=True))
    engine.turn()
    clock.now = 4.9
    engine.turn()
    assert not running.ended
    clock.now = 7
    run_until_idle(engine)
    assert isinstance(running.error, DeadlineError)
    assert len(running.chunks) == 2
    assert isinstance(waiting.error, DeadlineError)
    assert waiting.chunks == []
    assert patient.result[0][1] == "length"


def test_a_step_is_wanted_until_the_last_deadline_of_its_requests() -> None:
    wanted: list[float] = []
    engine = make_engine(FakeBackbone(), FakeClock(), wanted_until=wanted.append)
    submit(engine, make_request([1], "a", timeout_s=5, max_tokens=3, ignore_eos=True))
    engine.turn()
    submit(engine, make_request([2], "b", timeout_s=8, max_tokens=3, ignore_eos=True))
    engine.turn()
    submit(engine, make_request([3], "c", max_tokens=1, ignore_eos=True))
    engine.turn()
    assert wanted == [5.0, 8.0, float("inf")]


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(FakeBackbone(num_pages=4))
    with pytest.raises(RequestError) as caught:
        submit(engine, make_request([1] * 10, max_tokens=8))
    assert caught.value.param == "max_tokens"
    assert not engine.turn()


def test_the_queue_is_bounded_beyond_what_can_start_at_once() -> None:
    engine = make_engine(FakeBackbone(), max_sequences=2, max_queued_requests=3)
    inboxes = [submit(engine, make_request([1, i], f"r{i}", max_tokens=5, ignore_eos=True)) for i in range(5)]
    with pytest.raises(OverloadedError) as caught:
        submit(engine, make_request([1], "one too many"))
    assert caught.value.retry_after_s >= 1
    engine.turn()
    with pytest.raises(OverloadedError):
        submit(engine, make_request([1], "still one too many"))
    run_until_idle(engine)
    assert all(inbox.ended for inbox in inboxes)
    submit(engine, make_request([1], "room again"))
    run_until_idle(engine)


def test_a_queue_that_the_pool_holds_up_has_no_more_room_than_it_says() -> None:
    engine = make_engine(FakeBackbone(num_pages=4), max_sequences=4, max_queued_requests=1)
    submit(engine, make_request([1] * 9, "large", max_tokens=5, ignore_eos=True))
    submit(engine, make_request([2] * 9, "waits", max_tokens=5))
    engine.turn()
    with pytest.raises(OverloadedError):
        submit(engine, make_request([3], "too many"))


def test_a_consumer_that_raises_loses_its_request_only(caplog: pytest.LogCaptureFixture) -> None:
    backbone = FakeBackbone()
    engine = make_engine(backbone)

    def broken(_: object) -> None:
        raise OSError("gone")

    engine.submit(make_request([1], "broken", x_request_id="given"), broken)
    inbox = submit(engine, make_request([2], "fine"))
    with caplog.at_level(logging.ERROR):
        run_until_idle(engine)
    assert inbox.result == expected(make_request([2]), backbone)
    [record] = caplog.records
    assert "broken" in record.getMessage()
    assert vars(record)["request_id"] == "given"


def test_stop_fails_what_is_left_and_refuses_what_comes() -> None:
    engine = make_engine(FakeBackbone())
    running = submit(engine, make_request([1], "running", max_tokens=50, ignore_eos=True))
    engine.turn()
    queued = submit(engine, make_request([2], "queued"))
    engine.stop()
    for inbox in (running, queued):
        assert isinstance(inbox.error, RouterStoppingError)
        assert inbox.error.retryable
    with pytest.raises(RouterStoppingError):
        submit(engine, make_request([3], "late"))
    engine.check_idle()


class Running:
    """A started engine; `wait` until its requests have ended."""

    def __init__(self, backbone: FakeBackbone, **limits: int) -> None:
        self.engine: Engine = make_engine(backbone, **limits)

    def __enter__(self) -> Engine:
        self.engine.start()
        return self.engine

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self.engine.check_idle()


async def gather(engine: Engine, requests: list[GenerationRequest]) -> list[dict[int, tuple[list[int], str | None]]]:
    """Consume all requests at once through outboxes."""

    async def consume(request: GenerationRequest) -> dict[int, tuple[list[int], str | None]]:
        inbox = Inbox(request.sampling.n)
        async for message in generate(engine, request):
            if isinstance(message, TokenChunk):
                inbox(message)
        return inbox.result

    return list(await asyncio.gather(*(consume(request) for request in requests)))


def test_the_thread_serves_an_asyncio_loop() -> None:
    backbone = FakeBackbone()
    requests = [
        make_request(p, f"r{i}", max_tokens=10, seed=i, n=1 + i % 2, **SAMPLED) for i, p in enumerate(prompts(12))
    ]
    with Running(backbone) as engine:
        results = asyncio.run(gather(engine, requests))
        assert engine.drain(5)
    assert results == [expected(request, backbone) for request in requests]


def test_an_idle_thread_sleeps_and_wakes_for_the_next_request() -> None:
    backbone = FakeBackbone()
    with Running(backbone) as engine:
        for index in range(3):
            asyncio.run(gather(engine, [make_request([index + 1], f"r{index}", max_tokens=2, ignore_eos=True)]))
            steps = engine.stats().steps
            assert steps == 2 * (index + 1)
    assert len(backbone.steps) == 6, "an idle engine runs no steps"


def test_drain_finishes_what_runs_refuses_what_comes_and_says_when_time_is_up() -> None:
    backbone = FakeBackbone()
    entered, leave = threading.Event(), threading.Event()

    def hold(_: StepInput) -> None:
        entered.set()
        assert leave.wait(30)

    backbone.before_forward = hold
    with Running(backbone) as engine:
        inbox = submit(engine, make_request([1, 2]))
        assert entered.wait(30)
        assert not engine.drain(0)
        with pytest.raises(RouterStoppingError):
            submit(engine, make_request([3], "late"))
        leave.set()
        assert engine.drain(30)
        assert inbox.result == expected(make_request([1, 2]), backbone)


def test_stop_does_not_wait_for_ever_for_a_step_that_hangs() -> None:
    backbone = FakeBackbone()
    entered, leave = threading.Event(), threading.Event()

    def hang(_: StepInput) -> None:
        entered.set()
        assert leave.wait(30)

    backbone.before_forward = hang
    engine = make_engine(backbone)
    engine.start()
    inbox = submit(engine, make_request([1, 2]))
    assert entered.wait(30)
    engine.stop(timeout_s=0.01)
    assert isinstance(inbox.error, RouterStoppingError)
    leave.set()
    engine.stop()
    engine.check_idle()
    assert inbox.chunks == []


def test_a_defect_of_the_engine_itself_fails_everybody_and_the_thread_survives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = FakeBackbone()
    inbox, ended = Inbox(), threading.Event()

    def receive(item: TokenChunk | Exception) -> None:
        inbox(item)
        ended.set()

    with Running(backbone) as engine, caplog.at_level(logging.ERROR):
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, "schedule", lambda: 1 / 0)
            engine.submit(make_request([1], "lost"), receive)
            assert ended.wait(30)
        assert "the engine failed outside a step: lost\n" in caplog.text
        assert isinstance(inbox.error, EngineError)
        [result] = asyncio.run(gather(engine, [make_request([2], "after")]))
    assert result == expected(make_request([2]), backbone)


def test_submissions_and_cancellations_from_many_threads_leave_nothing_behind() -> None:
    backbone = FakeBackbone(num_pages=24)
    chance = random.Random(1)
    plans = [(f"r{i}", p, chance.random() < 0.4) for i, p in enumerate(prompts(60, longest=10))]

    def serve(plan: tuple[str, list[int], bool]) -> bool:
        request_id, tokens, cancel = plan
        request = make_request(tokens, request_id, max_tokens=6, seed=1, **SAMPLED)

        async def consume() -> bool:
            inbox = Inbox()
            async for message in generate(engine, request):
                if isinstance(message, TokenChunk):
                    inbox(message)
                if cancel:
                    return True
            return inbox.result == expected(request, backbone)

        return asyncio.run(consume())

    with Running(backbone) as engine:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(serve, plans))
        assert engine.drain(30)


arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "tokens": st.lists(st.integers(1, 3), min_size=1, max_size=18),
            "max_tokens": st.integers(1, 10),
            "n": st.integers(1, 3),
            "temperature": st.sampled_from([0.0, 1.0]),
            "ignore_eos": st.booleans(),
            "wait": st.integers(0, 3),
            "cancel_after": st.none() | st.integers(0, 6),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=arrivals,
    num_pages=st.integers(7, 14),
    max_batch_tokens=st.integers(3, 20),
    fail_at=st.none() | st.integers(0, 15),
)
def test_any_workload_equals_the_sequential_oracle(
    arrivals: list[dict[str, object]], num_pages: int, max_batch_tokens: int, fail_at: int | None
) -> None:
    backbone = FakeBackbone(num_pages=num_pages)

    def maybe_fail(_: StepInput) -> None:
        if len(backbone.steps) == fail_at:
            raise ExpertsUnavailableError("gone")

    backbone.before_forward = maybe_fail
    engine = make_engine(backbone, max_batch_tokens=max_batch_tokens, max_sequences=3)
    served: list[tuple[GenerationRequest, Inbox]] = []
    cancel_at: dict[int, str] = {}
    now = 0
    for index, options in enumerate(arrivals):
        fields = dict(options)
        wait, cancel_after, tokens = fields.pop("wait"), fields.pop("cancel_after"), fields.pop("tokens")
        assert isinstance(wait, int)
        assert isinstance(tokens, list)
        for _ in range(wait):
            engine.turn()
            now += 1
        request = make_request(tokens, f"r{index}", seed=index, **fields)
        served.append((request, submit(engine, request)))
        if isinstance(cancel_after, int):
            cancel_at[now + cancel_after] = request.request_id
    asked: set[str] = set()
    for step in turns(engine):
        if now + step in cancel_at:
            request_id = cancel_at.pop(now + step)
            asked.add(request_id)
            engine.cancel(request_id)
    engine.check_idle()
    cancelled = {request.request_id for request, inbox in served if not inbox.ended}
    assert cancelled <= asked, "only a cancelled request ends without a word"
    for request, inbox in served:
        oracle = expected(request, backbone)
        if request.request_id in cancelled or inbox.error is not None:
            for choice, (tokens, _) in inbox.result.items():
                assert tokens == oracle[choice][0][: len(tokens)]
        else:
            assert inbox.result == oracle
    assert fail_at is not None or all(inbox.error is None for _, inbox in served)

"""Who may join the queue, how long that is, and when the others should come back; over the fake model. About 4 s."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import OverloadedError
from deployments.router.admission import LONGEST_S, Job, wait_steps
from deployments.router.engine import Engine
from tests.deployments.router.fake_backbone import (
    FakeBackbone,
    FakeClock,
    Inbox,
    make_engine,
    make_request,
    run_until_idle,
    submit,
)

SLOTS, TOKENS, SHARE = 8, 40, 0.75


def bounded(backbone: FakeBackbone | None = None, clock: FakeClock | None = None, **limits: int) -> Engine:
    engine = make_engine(backbone or FakeBackbone(num_pages=400), clock, **{"max_sequences": SLOTS, **limits})
    engine._admission._max_wait_share = SHARE
    return engine


@dataclass
class Served:
    """An accepted request: the step it came in, and the one it ended in."""

    inbox: Inbox
    came: int
    ended: int = 0


class Crowd:
    """Requests of one size that arrive while the engine turns; one step is one unit of time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.accepted: list[Served] = []
        self.refused = 0
        self.most_waiting = 0
        self._now = 0
        self._open: deque[Served] = deque()
        self._count = 0

    @property
    def open(self) -> int:
        return len(self._open)

    def arrive(self, count: int) -> None:
        for _ in range(count):
            self._count += 1
            request = make_request([1 + self._count % 50, 2], f"r{self._count}", max_tokens=TOKENS, ignore_eos=True)
            try:
                served = Served(submit(self.engine, request), self._now)
            except OverloadedError:
                self.refused += 1
                continue
            self.accepted.append(served)
            self._open.append(served)

    def step(self) -> None:
        self.engine.turn()
        self._now += 1
        self.most_waiting = max(self.most_waiting, self.engine.stats().waiting)
        for served in [each for each in self._open if each.inbox.ended]:
            served.ended = self._now
            self._open.remove(served)

    def latencies(self, since: int, until: int) -> list[int]:
        return [each.ended - each.came for each in self.accepted if each.ended and since <= each.came < until]


def at_the_limit() -> tuple[float, int]:
    """Mean steps of a request, and requests ended in 400 steps, when every slot is always taken and nobody waits."""
    crowd = Crowd(bounded())
    for _ in range(400):
        crowd.arrive(SLOTS - crowd.open)
        crowd.step()
    latencies = crowd.latencies(0, 400)
    return statistics.mean(latencies), len(latencies)


@pytest.mark.parametrize("times", [2, 10])
def test_beyond_the_limit_accepted_requests_take_at_most_twice_as_long_and_no_fewer_end(times: int) -> None:
    limit_steps, limit_count = at_the_limit()
    crowd = Crowd(bounded())
    due = 0.0
    for _ in range(400):
        due += times * SLOTS / TOKENS
        crowd.arrive(int(due))
        due -= int(due)
        crowd.step()
    latencies = crowd.latencies(0, 400)
    assert max(latencies) <= (1 + SHARE) * limit_steps + 2
    assert max(latencies) > limit_steps, "a queue is used"
    assert len(latencies) >= 0.9 * limit_count
    assert crowd.most_waiting <= SLOTS
    assert crowd.refused > 0
    assert crowd.engine.stats().refused == crowd.refused
    for _ in range(2 * TOKENS):  # the load has fallen to what fits
        crowd.arrive(max(0, SLOTS - crowd.open))
        crowd.step()
    assert statistics.mean(crowd.latencies(400 + TOKENS, 400 + 2 * TOKENS) or [limit_steps]) <= limit_steps + 1
    crowd.engine.stop()


def test_what_a_slot_and_pages_are_free_for_is_never_refused() -> None:
    engine = bounded()
    inboxes = [submit(engine, make_request([3] * 30, f"r{i}", max_tokens=1)) for i in range(SLOTS)]
    run_until_idle(engine)
    assert all(inbox.ended for inbox in inboxes)


def test_few_large_requests_fill_the_queue_that_many_small_ones_do_not() -> None:
    """All slots are taken by requests that are half done; a queue of small ones passes, one of large ones does not."""

    def accepted(max_tokens: int, choices: int) -> int:
        engine = bounded(FakeBackbone(num_pages=1000))
        for index in range(SLOTS):
            submit(engine, make_request([1], f"running{index}", max_tokens=20, ignore_eos=True))
        for _ in range(10):
            engine.turn()
        return full(engine, [2], "r", max_tokens=max_tokens, n=choices)

    assert accepted(max_tokens=2, choices=1) >= 3 * SLOTS
    assert accepted(max_tokens=80, choices=1) == SLOTS, "each slot will be free in time once"
    assert accepted(max_tokens=80, choices=4) == SLOTS / 4


def test_long_prompts_that_fill_the_pool_count_by_their_pages() -> None:
    """Slots are free, pages are not: who comes waits for pages, so the bound holds all the same."""
    engine = bounded(FakeBackbone(num_pages=24), max_queued_requests=100)
    assert full(engine, [5] * 40, "first", max_tokens=10) == 2
    for _ in range(6):
        engine.turn()
    assert full(engine, [5] * 40, "second", max_tokens=10) == 2, "in the pages of the first two, which end soon"


def full(engine: Engine, tokens: list[int], name: str, **sampling: int) -> int:
    """Submit such requests until one is refused; how many were not."""
    for index in range(1000):
        try:
            submit(engine, make_request(tokens, f"{name}{index}", ignore_eos=True, **sampling))
        except OverloadedError:
            return index
    raise AssertionError("the engine takes everything")


def test_a_request_accepted_once_goes_on_here_although_new_ones_are_refused() -> None:
    engine = bounded()
    full(engine, [1, 2], "full", max_tokens=TOKENS)
    with pytest.raises(OverloadedError):
        submit(engine, make_request([1, 2, 3], "new", max_tokens=TOKENS))
    resumed = submit(engine, make_request([1, 2, 3], "resumed", 2, max_tokens=TOKENS, ignore_eos=True))
    run_until_idle(engine)
    assert resumed.result[0][1] == "length"


def test_more_prompts_of_one_request_than_there_are_places_are_all_let_in_once_the_first_is() -> None:
    engine = bounded()
    first = submit(engine, make_request([1, 2], "prompt0", max_tokens=TOKENS, ignore_eos=True))
    others = [
        submit(engine, make_request([1, 2], f"prompt{i}", max_tokens=TOKENS, ignore_eos=True, accepted=True))
        for i in range(1, 32)
    ]
    run_until_idle(engine)
    assert all(each.result[0][1] == "length" for each in (first, *others))


def test_even_those_are_bounded() -> None:
    engine = make_engine(FakeBackbone(), max_sequences=1, max_queued_requests=2)
    assert full(engine, [1, 2, 3], "resumed", prompt_tokens=2, max_tokens=5) == 1 + 2 * 2


def test_whoever_comes_back_when_told_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second; ten are refused at once, and each gets a place of its own."""
    clock = FakeClock()
    engine = bounded(clock=clock)
    took = engine._admission.step
    monkeypatch.setattr(engine._admission, "step", lambda _: took(0.25))
    full(engine, [1, 2], "full", max_tokens=TOKENS)
    for _ in range(4):
        engine.turn()
        clock.now += 0.25
    due: list[tuple[float, str]] = []
    for index in range(4):
        with pytest.raises(OverloadedError) as caught:
            submit(engine, make_request([1, 2], f"late{index}", max_tokens=TOKENS, ignore_eos=True))
        assert 1 <= caught.value.retry_after_s <= LONGEST_S
        due.append((clock.now + caught.value.retry_after_s, f"late{index}"))
    assert [at for at, _ in due] == sorted(at for at, _ in due)
    assert due[-1][0] > due[0][0], "not all for the same place"
    assert due[0][0] > clock.now + 1, "an honest guess, not the least there is"
    for at, name in due:
        while clock.now < at:
            engine.turn()
            clock.now += 0.25
        submit(engine, make_request([1, 2], name, max_tokens=TOKENS, ignore_eos=True))
    run_until_idle(engine)


def test_answers_that_end_early_shorten_the_wait() -> None:
    """`max_tokens` says 90, answers take a few: after some of them pages are promised to more requests."""

    def waiting_for_pages(used: float) -> float:
        engine = bounded(FakeBackbone(num_pages=60))
        engine._admission._used_share = used
        for index in range(4):
            submit(engine, make_request([1], f"r{index}", max_tokens=90, ignore_eos=True))
        [newest] = engine._live["r3"].sequences
        present = [each for live in engine._live.values() for each in live.sequences if each is not newest]
        return engine._admission._wait(newest, present * 2)

    assert waiting_for_pages(0.1) < waiting_for_pages(1.0)
    engine = bounded()
    for index in range(30):
        submit(engine, make_request([1 + index], f"r{index}", max_tokens=90))  # the fake model ends most of them soon
        run_until_idle(engine)
    assert engine._admission._used_share < 0.9


jobs = st.builds(Job, st.just(0), st.integers(1, 9), st.integers(1, 4))


@given(running=st.lists(jobs, max_size=4), waiting=st.lists(jobs, min_size=1, max_size=8), pages=st.integers(4, 16))
def test_the_wait_is_that_of_a_queue_played_through_step_by_step(
    running: list[Job], waiting: list[Job], pages: int
) -> None:
    slots = 4
    left = [[job.output_steps, job.pages] for job in running]
    queue = list(waiting)
    now = 0
    while True:
        while queue:
            held = sum(size for _, size in left)
            if left and (len(left) >= slots or pages - held < queue[0].pages):
                break
            job = queue.pop(0)
            left.append([job.output_steps, job.pages])
        if not queue:
            break
        now += 1
        left = [[steps - 1, size] for steps, size in left if steps > 1]
    assert wait_steps(running, waiting, slots, pages) == now


def test_prompts_share_the_budget_one_after_the_other() -> None:
    running = [Job(2, 1, 1), Job(3, 1, 1)]
    # The first ends after 2 + 1 steps, the second after 2 + 3 + 1.
    assert wait_steps(running, [Job(0, 1, 1)], slots=2, pages=9) == 3
    assert wait_steps(running, [Job(0, 9, 1), Job(0, 1, 1)], slots=2, pages=9) == 6


def test_a_prompt_that_waits_is_computed_after_those_before_it() -> None:
    # One runs for a step more. The two prompts of 4 steps each start then, and end, with a token each, after 6 and 10.
    running, waiting = [Job(0, 1, 1), Job(0, 1, 1)], [Job(4, 1, 1), Job(4, 1, 1)]
    assert wait_steps(running, [*waiting, Job(0, 1, 1)], slots=2, pages=9) == 6
    assert wait_steps(running, [*waiting, Job(0, 9, 1), Job(0, 1, 1)], slots=2, pages=9) == 10

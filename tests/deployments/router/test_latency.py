"""Percentiles of the last seconds, against a list of every single token. Under a second; time is a number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.router.latency import MAX_ENTRIES, WINDOW_S, Latency, Percentiles
from deployments.router.sequence import Sequence
from tests.deployments.router.fake_backbone import (
    FakeBackbone,
    FakeClock,
    make_engine,
    make_request,
    run_until_idle,
    submit,
    turns,
)


@dataclass
class Steps:
    """Sequences that get tokens at given times."""

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.latency = Latency(self.clock)

    def start(self, leader: Sequence | None = None) -> Sequence:
        request = make_request([1, 2])
        return Sequence(request, 0, 0, 100, leader, [1, 2], awaited_since_s=self.clock.now)

    def step(self, *sequences: Sequence, at_s: float) -> None:
        self.clock.now = at_s
        for sequence in sequences:
            sequence.tokens.append(3)
        self.latency.step(sequences, at_s)


def p95(values: list[float]) -> float | None:
    """Nearest rank, value by value."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None


def test_nothing_yet_is_nothing_not_zero() -> None:
    assert Steps().latency.percentiles() == Percentiles(None, None)


def test_the_first_token_counts_from_submission_and_others_from_the_one_before() -> None:
    steps = Steps()
    sequence = steps.start()
    steps.step(sequence, at_s=0.75)
    assert steps.latency.percentiles() == Percentiles(0.75, None)
    steps.step(sequence, at_s=1.0)
    assert steps.latency.percentiles() == Percentiles(0.75, 0.25)


def test_only_the_first_choice_of_a_request_has_a_first_token() -> None:
    steps = Steps()
    leader = steps.start()
    follower = steps.start(leader)
    steps.step(leader, at_s=0.5)
    steps.step(leader, follower, at_s=3.0)
    assert steps.latency.percentiles() == Percentiles(0.5, 2.5)
    steps.step(follower, at_s=3.25)
    steps.clock.now = 3.0 + WINDOW_S + 0.125
    assert steps.latency.percentiles() == Percentiles(None, 0.25)


def test_what_is_older_than_the_window_does_not_count() -> None:
    steps = Steps()
    slow, quick = steps.start(), steps.start()
    steps.step(slow, at_s=8.0)
    steps.step(quick, at_s=8.0)
    steps.step(quick, at_s=15.0)
    steps.step(quick, at_s=15.5)
    assert steps.latency.percentiles() == Percentiles(8.0, 7.0)
    steps.clock.now = 25.25
    assert steps.latency.percentiles() == Percentiles(None, 0.5)
    steps.clock.now = 26.0
    assert steps.latency.percentiles() == Percentiles(None, None)


def test_sequences_that_step_together_cost_one_entry() -> None:
    steps = Steps()
    together = [steps.start() for _ in range(64)]
    for number in range(MAX_ENTRIES - 1):
        steps.step(*together, at_s=number / 1024)
    assert len(steps.latency._next) == MAX_ENTRIES - 2
    assert len(steps.latency._first) == 64
    steps.step(*together, at_s=9.0)
    assert steps.latency.percentiles().tpot_p95_s == 1 / 1024
    for number in range(2 * MAX_ENTRIES):
        steps.step(*together, at_s=9.0 + number / 1024)
    assert len(steps.latency._next) == MAX_ENTRIES


@given(st.lists(st.tuples(st.sampled_from([0.125, 0.5, 1.0]), st.sets(st.integers(0, 5))), max_size=40))
def test_percentiles_are_those_of_all_tokens_of_the_window(story: list[tuple[float, set[int]]]) -> None:
    steps = Steps()
    sequences = [steps.start() for _ in range(6)]
    times: list[list[float]] = [[0.0] for _ in sequences]
    for pause_s, members in story:
        now = steps.clock.now + pause_s
        steps.step(*[sequences[number] for number in sorted(members)], at_s=now)
        for number in members:
            times[number].append(now)
    since = steps.clock.now - WINDOW_S
    first = [each[1] for each in times if len(each) > 1 and each[1] >= since]
    following = [b - a for each in times for a, b in pairwise(each[1:]) if b >= since]
    assert steps.latency.percentiles() == Percentiles(p95(first), p95(following))


def test_an_engine_counts_the_queue_in_and_a_resumed_request_anew() -> None:
    clock = FakeClock()
    backbone = FakeBackbone()
    engine = make_engine(backbone, clock, max_sequences=1)

    def second(step: object) -> None:  # noqa: ARG001 - a hook
        clock.now += 1.0

    backbone.before_forward = second
    submit(engine, make_request([5, 6, 7], "first", max_tokens=3, ignore_eos=True))
    submit(engine, make_request([8, 9, 7, 4], "resumed", 2, max_tokens=3, ignore_eos=True))
    for _ in turns(engine):
        if clock.now == 1.0:
            # Both have been there for as long; one of them still waits.
            assert engine.latency() == Percentiles(1.0, None)
    engine.check_idle()
    # The second waits for the three steps of the first.
    assert engine.latency() == Percentiles(4.0, 1.0)
    clock.now += WINDOW_S
    assert engine.latency() == Percentiles(4.0, None)
    clock.now += 0.5
    assert engine.latency() == Percentiles(None, None)


def test_who_waits_longer_than_anybody_did_counts_already() -> None:
    clock = FakeClock()
    engine = make_engine(FakeBackbone(), clock, max_sequences=1)
    submit(engine, make_request([5, 6, 7], "first", max_tokens=3, ignore_eos=True))
    submit(engine, make_request([8, 9], "second", 2, max_tokens=3, ignore_eos=True))
    engine.turn()
    clock.now += 60
    assert engine.latency().ttft_p95_s == 60, "nothing finished of late, and yet it is slow"
    engine.cancel("first")
    engine.cancel("second")
    engine.turn()
    assert engine.latency() == Percentiles(None, None)


def test_a_request_that_is_cancelled_or_fails_has_no_latency() -> None:
    clock = FakeClock()
    backbone = FakeBackbone()
    engine = make_engine(backbone, clock)

    def fail(step: object) -> None:
        raise ValueError(step)

    submit(engine, make_request([5, 6, 7], "cancelled"))
    engine.cancel("cancelled")
    run_until_idle(engine)
    backbone.before_forward = fail
    inbox = submit(engine, make_request([5, 6, 7], "failed"))
    run_until_idle(engine)
    assert inbox.error is not None
    assert engine.latency() == Percentiles(None, None)


def test_recomputing_a_preempted_sequence_is_time_between_its_tokens() -> None:
    clock = FakeClock()
    backbone = FakeBackbone(num_pages=8)
    engine = make_engine(backbone, clock)

    def quarter(step: object) -> None:  # noqa: ARG001 - a hook
        clock.now += 0.25

    backbone.before_forward = quarter
    inboxes = [submit(engine, make_request([n, n, n], f"r{n}", max_tokens=16, ignore_eos=True)) for n in range(1, 5)]
    run_until_idle(engine)
    assert engine.stats().preemptions > 0
    assert all(len(inbox.chunks) == 16 for inbox in inboxes)
    assert max(gap for _, gap, _ in engine._latency._next) > 0.5
    # One gap between each two tokens of a sequence, none lost and none counted twice.
    assert sum(count for _, _, count in engine._latency._next) == 4 * 15

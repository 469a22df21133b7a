"""Which tokens make a step: order, budget, admission, preemption, reuse. Without a model; about 3 s."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.router.page_pool import PagePool
from deployments.router.scheduler import Plan, Scheduler
from deployments.router.sequence import Sequence, make_sequences
from tests.deployments.router.fake_backbone import FakeBackbone, check_step, make_request

PAGE = 4
ANY_TOKEN = 7


def make_scheduler(pages: int = 32, max_batch_tokens: int = 16, max_sequences: int = 4) -> Scheduler:
    return Scheduler(PagePool(pages, PAGE), max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)


def arrive(scheduler: Scheduler, *prompts: list[int], max_tokens: int = 8, n: int = 1) -> list[Sequence]:
    """Queue one request per prompt, in this order."""
    sequences: list[Sequence] = []
    for tokens in prompts:
        request = make_request(tokens, max_tokens=max_tokens, n=n, ignore_eos=True)
        new = make_sequences(request, FakeBackbone(page_tokens=PAGE), len(sequences))
        sequences += new
        for sequence in new:
            scheduler.add(sequence)
    return sequences


def run(scheduler: Scheduler) -> Plan:
    """One step in which every sequence that asks for a token gets the same."""
    plan = scheduler.schedule()
    if plan.sequences:
        check_step(plan.step, PAGE)
    scheduler.advance(plan)
    for sequence in plan.sampled:
        sequence.append(ANY_TOKEN, frozenset())
        if sequence.finish_reason:
            scheduler.remove(sequence)
    return plan


def lengths(plan: Plan) -> list[int]:
    return [part.length for part in plan.step.slices]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert make_scheduler().schedule().sequences == []


def test_a_long_prompt_is_computed_in_chunks_and_sampled_at_its_end() -> None:
    scheduler = make_scheduler(max_batch_tokens=8)
    arrive(scheduler, list(range(1, 20)))
    plans = [run(scheduler) for _ in range(4)]
    assert [lengths(plan) for plan in plans] == [[8], [8], [3], [1]]
    assert [len(plan.sampled) for plan in plans] == [0, 0, 1, 1]
    assert [plan.prefill_tokens for plan in plans] == [8, 8, 3, 0]
    assert plans[2].step.logits_rows == [2]
    assert plans[3].step.tokens == [ANY_TOKEN]


def test_decoding_goes_first_and_prompts_share_what_is_left_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_batch_tokens=10)
    first, second, third = arrive(scheduler, [1, 2], [3] * 12, [4] * 6)
    assert lengths(run(scheduler)) == [2, 8]
    plan = run(scheduler)
    assert plan.sequences == [first, second, third]
    assert lengths(plan) == [1, 4, 5]


def test_slices_of_one_token_come_before_longer_ones_even_if_they_end_a_prompt() -> None:
    scheduler = make_scheduler(max_batch_tokens=9)
    arrive(scheduler, [1] * 8, [2])
    assert lengths(run(scheduler)) == [1, 8]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = make_scheduler(max_sequences=2)
    arrive(scheduler, [1], [2], [3], max_tokens=2)
    assert lengths(run(scheduler)) == [1, 1]
    assert len(scheduler.waiting) == 1
    run(scheduler)
    assert lengths(run(scheduler)) == [1]


def test_a_prompt_waits_until_all_its_pages_and_one_more_are_available() -> None:
    scheduler = make_scheduler(pages=4)
    first, second = arrive(scheduler, [1] * 3, [2] * 9, max_tokens=2)
    assert run(scheduler).sequences == [first]
    assert run(scheduler).sequences == [first], "three pages are available, and three plus one are needed"
    assert run(scheduler).sequences == [second]


def test_a_prompt_that_needs_the_whole_pool_runs_alone() -> None:
    scheduler = make_scheduler(pages=4)
    first, second = arrive(scheduler, [1], [2] * 15, max_tokens=2)
    assert [run(scheduler).sequences for _ in range(3)] == [[first], [first], [second]]


def test_waiting_sequences_do_not_overtake() -> None:
    scheduler = make_scheduler(pages=5)
    arrive(scheduler, [1] * 8, [2] * 12, [3])
    run(scheduler)
    assert [len(s.tokens) for s in scheduler.waiting] == [12, 1]


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = make_scheduler()
    prompt = list(range(1, 13))
    [first] = arrive(scheduler, prompt, max_tokens=1)
    run(scheduler)
    assert first.finish_reason == "length"
    [same] = arrive(scheduler, prompt)
    plan = run(scheduler)
    assert lengths(plan) == [4]
    assert plan.step.positions == [8, 9, 10, 11]
    assert same.cached_tokens == 8
    [longer] = arrive(scheduler, [*prompt, 50])
    assert run(scheduler).step.positions[-1] == 12
    assert longer.cached_tokens == 12


def test_generated_pages_are_reused_as_well() -> None:
    scheduler = make_scheduler()
    [first] = arrive(scheduler, [1, 2, 3], max_tokens=6)
    while not first.finish_reason:
        run(scheduler)
    [turn_two] = arrive(scheduler, [*first.tokens, 9, 9])
    run(scheduler)
    assert turn_two.cached_tokens == 8


def test_a_resume_reports_no_more_cached_tokens_than_the_prompt_has() -> None:
    scheduler = make_scheduler()
    [first] = arrive(scheduler, [1] * 12, max_tokens=1)
    run(scheduler)
    assert first.finish_reason
    request = make_request([1] * 12, prompt_tokens=5)
    [resumed] = make_sequences(request, FakeBackbone(page_tokens=PAGE), 1)
    scheduler.add(resumed)
    assert lengths(run(scheduler)) == [4]
    assert resumed.cached_tokens == 5


def test_choices_wait_for_the_first_and_share_its_prompt() -> None:
    scheduler = make_scheduler(max_batch_tokens=6)
    leader, *others = arrive(scheduler, list(range(1, 11)), n=3)
    assert run(scheduler).sequences == [leader]
    assert run(scheduler).sequences == [leader]
    plan = run(scheduler)
    assert plan.sequences == [leader, *others]
    assert lengths(plan) == [1, 2, 2], "the full pages are shared, the tail is computed by each"
    assert all(other.pages[:2] == leader.pages[:2] for other in others)


def test_held_choices_do_not_block_later_requests() -> None:
    scheduler = make_scheduler(max_batch_tokens=12)
    arrive(scheduler, [1] * 8, n=2)
    [later] = arrive(scheduler, [2] * 4)
    later.arrival = 9
    assert later in run(scheduler).sequences


def test_a_full_pool_preempts_the_youngest_and_recomputes_it_later() -> None:
    scheduler = make_scheduler(pages=3)
    old, young = arrive(scheduler, [1] * 4, [2] * 3, max_tokens=6)
    run(scheduler)
    for _ in range(20):
        run(scheduler)
        if scheduler.preemptions:
            break
    assert scheduler.waiting == [young]
    assert young.pages == []
    while not old.finish_reason:
        assert young not in run(scheduler).sequences or old.finish_reason
    while not young.finish_reason:
        run(scheduler)
    assert len(young.tokens) == 9
    scheduler.pool.check_idle()


def test_removing_a_waiting_or_running_sequence_frees_its_pages() -> None:
    scheduler = make_scheduler(max_sequences=1)
    first, second = arrive(scheduler, [1] * 8, [2] * 8)
    run(scheduler)
    scheduler.remove(second)
    scheduler.remove(first)
    assert (scheduler.running, scheduler.waiting) == ([], [])
    scheduler.pool.check_idle()


def test_more_sequences_than_tokens_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sequences"):
        make_scheduler(max_batch_tokens=3, max_sequences=4)


workloads = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=20), st.integers(1, 10), st.integers(1, 3)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=80, deadline=None)
@given(workload=workloads, pages=st.integers(8, 16), max_batch_tokens=st.integers(3, 12), every=st.integers(1, 3))
def test_any_workload_finishes_within_its_limits(
    workload: list[tuple[list[int], int, int]], pages: int, max_batch_tokens: int, every: int
) -> None:
    scheduler = make_scheduler(pages=pages, max_batch_tokens=max_batch_tokens, max_sequences=3)
    backbone = FakeBackbone(page_tokens=PAGE, num_pages=pages)
    sequences: list[Sequence] = []
    pending = list(workload)
    for step in range(3000):
        if pending and step % every == 0:
            tokens, max_tokens, n = pending.pop(0)
            request = make_request(tokens, max_tokens=max_tokens, n=n, ignore_eos=True)
            for sequence in make_sequences(request, backbone, len(sequences)):
                sequences.append(sequence)
                scheduler.add(sequence)
        plan = run(scheduler)
        assert len(plan.step.tokens) <= max_batch_tokens
        assert len(plan.sequences) <= 3
        assert plan.sequences or not (scheduler.running or scheduler.waiting), "work waits, but nothing runs"
        scheduler.pool.check()
        if not pending and not scheduler.running and not scheduler.waiting:
            break
    assert all(len(s.tokens) == s.limit for s in sequences)
    scheduler.pool.check_idle()

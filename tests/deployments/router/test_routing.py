"""What prompts show of their experts: rows against a count by hand, over the fake model and a real one. About 5 s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.blueprint import make_blueprint
from cluster.errors import EngineError
from deployments.router.engine import Engine
from deployments.router.routing import RoutingRecord, Shown, coming
from deployments.router.runtime import RouterRuntime
from deployments.router.sequence import Sequence, make_sequences
from deployments.router.step import StepInput
from tests import models
from tests.deployments.router.fake_backbone import (
    FakeBackbone,
    make_engine,
    make_request,
    run_until_idle,
    submit,
    turns,
)
from tests.parity.split_model import config

GROUPS, LAYERS, TOP_K = 3, 2, 2


def groups_of(token: int, layer: int) -> list[int]:
    """The groups of a token's two rows."""
    return [token % GROUPS, (token // GROUPS + layer) % GROUPS]


def rows_of(tokens: list[int]) -> list[int]:
    """Rows per group of all layers together."""
    rows = [0] * GROUPS
    for token in tokens:
        for layer in range(LAYERS):
            for group in groups_of(token, layer):
                rows[group] += 1
    return rows


class FakeLayers:
    """What a dispatcher tells whoever watches it, in the forward pass of the fake model. watched: of each step."""

    def __init__(self) -> None:
        self.watch: Callable[[npt.NDArray[np.int64]], None] | None = None
        self.watched: list[bool] = []
        self.fails = False

    def __call__(self, step: StepInput) -> None:
        self.watched.append(self.watch is not None)
        for layer in range(LAYERS):
            if self.watch is not None:
                self.watch(np.array([groups_of(token, layer) for token in step.tokens], dtype=np.int64))
            if self.fails:
                raise EngineError("a layer failed")


class Story:
    """An engine over the fake model, whose steps are watched."""

    def __init__(self, num_pages: int = 64, **limits: int) -> None:
        self.layers = FakeLayers()
        self.backbone = FakeBackbone(num_pages=num_pages)
        self.backbone.before_forward = self.layers
        sizes = {"max_batch_tokens": 8, "max_sequences": 4, "max_queued_requests": 100} | limits
        self.engine = Engine(self.backbone, routing=RoutingRecord(self.layers, GROUPS), **sizes)

    def submit(self, tokens: list[int], request_id: str, **sampling: object) -> list[Sequence]:
        submit(self.engine, make_request(tokens, request_id, ignore_eos=True, **sampling))
        return self.engine._live[request_id].sequences


def test_a_prompt_shows_its_rows_chunk_by_chunk_and_its_decode_steps_are_not_watched() -> None:
    story = Story()
    prompt = [7, 1, 30, 31, 8, 9, 50, 2, 3, 11]
    [sequence] = story.submit(prompt, "r", max_tokens=4)
    assert sequence.shown is None
    story.engine.turn()
    assert sequence.shown is not None
    assert (sequence.shown.rows.tolist(), sequence.shown.tokens) == (rows_of(prompt[:8]), 8)
    run_until_idle(story.engine)
    assert (sequence.shown.rows.tolist(), sequence.shown.tokens) == (rows_of(prompt), 10)
    assert story.layers.watched == [True, True, False, False, False]
    assert story.layers.watch is None


def test_rows_of_decoding_sequences_in_the_same_step_belong_to_nobody() -> None:
    story = Story()
    [first] = story.submit([4, 5, 6], "a", max_tokens=30)
    story.engine.turn()
    shown = first.shown
    [second] = story.submit([20, 21, 22, 23, 24, 25, 26, 27, 28, 29], "b", max_tokens=2)
    [third] = story.submit([40], "c", max_tokens=2)
    run_until_idle(story.engine)
    assert first.shown is shown
    for sequence, prompt in ((second, list(range(20, 30))), (third, [40])):
        assert sequence.shown is not None
        assert (sequence.shown.rows.tolist(), sequence.shown.tokens) == (rows_of(prompt), len(prompt))


def test_tokens_found_in_the_pool_show_nothing() -> None:
    story = Story()
    prompt = [7, 1, 30, 31, 8, 9, 50, 2, 3]
    story.submit(prompt, "first", max_tokens=2)
    run_until_idle(story.engine)
    [again] = story.submit(prompt, "again", max_tokens=2)
    run_until_idle(story.engine)
    assert again.cached_tokens == 8
    assert again.shown is not None
    assert (again.shown.rows.tolist(), again.shown.tokens) == (rows_of(prompt[8:]), 1)


def test_what_was_shown_survives_a_preemption() -> None:
    story = Story(num_pages=8)
    prompts = [[n, n + 20, n + 40] for n in range(1, 5)]
    sequences = [story.submit(prompt, f"r{prompt[0]}", max_tokens=16)[0] for prompt in prompts]
    preempted = 0
    for _ in turns(story.engine):
        for sequence in story.engine.undecoded():
            if len(sequence.tokens) > 3:
                preempted += 1
                assert sequence.shown is not None
                assert sequence.shown.tokens >= 3
    assert preempted
    for sequence in sequences:
        assert sequence.shown is not None
        assert sequence.shown.rows.sum() == sequence.shown.tokens * LAYERS * TOP_K


def test_a_step_that_fails_shows_nothing_and_the_next_is_counted_right() -> None:
    story = Story()
    story.layers.fails = True
    [failed] = story.submit([1, 2, 3], "failed")
    story.engine.turn()
    story.layers.fails = False
    assert failed.shown is None
    [sequence] = story.submit([9, 10, 11], "next", max_tokens=2)
    run_until_idle(story.engine)
    assert sequence.shown is not None
    assert sequence.shown.rows.tolist() == rows_of([9, 10, 11])
    assert story.layers.watch is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(4, 16),
    st.integers(0, 3),
)
def test_whatever_the_batch_a_prompt_shows_exactly_its_own_tokens(
    prompts: list[list[int]], max_batch_tokens: int, stagger: int
) -> None:
    story = Story(max_batch_tokens=max_batch_tokens)
    sequences = []
    for number, prompt in enumerate(prompts):
        sequences.append(story.submit([number + 1, *prompt], f"r{number}", max_tokens=3)[0])
        for _ in range(stagger):
            story.engine.turn()
    run_until_idle(story.engine)
    for sequence in sequences:
        shown = sequence.shown
        assert shown is not None
        prompt = list(sequence.request.tokens)
        assert (shown.rows.tolist(), shown.tokens) == (
            rows_of(prompt[sequence.cached_tokens :]),
            len(prompt) - sequence.cached_tokens,
        )


def test_undecoded_are_prompts_being_computed_and_as_many_that_wait_as_there_is_room_for() -> None:
    story = Story(max_sequences=2)
    [decoding] = story.submit([1, 2], "decoding", max_tokens=30)
    story.engine.turn()
    [prefilling] = story.submit(list(range(1, 20)), "prefilling", max_tokens=30)
    [waiting] = story.submit([5], "waiting", max_tokens=3)
    assert story.engine.undecoded() == [prefilling], "there is room for one beside the one that runs"
    story.engine.turn()
    [arrived] = story.submit([6], "arrived")
    assert story.engine.undecoded() == [prefilling], "and now for none"
    story.engine.cancel("decoding")
    story.engine.turn()
    assert arrived not in story.engine.undecoded()
    assert {*story.engine.undecoded()} <= {prefilling, waiting}
    while prefilling.remaining > 1:
        story.engine.turn()
    assert decoding not in story.engine.undecoded()
    assert prefilling not in story.engine.undecoded()
    for name in ("decoding", "prefilling", "waiting", "arrived"):
        story.engine.cancel(name)
    run_until_idle(story.engine)
    assert story.engine.undecoded() == []


def test_coming_rows_are_those_shown_or_the_mix_where_nothing_was_shown() -> None:
    known, unknown = (make_sequences(make_request([1, 2], name), FakeBackbone(), 0)[0] for name in "ab")
    known.shown = Shown(np.array([6, 0, 2]), 2)
    mix = np.array([1.0, 1.0, 2.0])
    assert coming([known], mix).tolist() == [3.0, 0.0, 1.0]
    assert coming([unknown], mix).tolist() == [1.0, 1.0, 2.0]
    assert coming([known, unknown, unknown], mix).tolist() == [5.0, 2.0, 5.0]
    assert coming([], mix).tolist() == [0.0, 0.0, 0.0]


def test_a_choice_that_waits_for_the_leaders_prompt_uses_what_that_showed() -> None:
    story = Story()
    sequences = story.submit(list(range(1, 13)), "r", n=3, max_tokens=2)
    story.engine.turn()
    waiting = [sequence for sequence in story.engine.undecoded() if sequence.leader is not None]
    assert waiting == sequences[1:]
    expected = np.array(rows_of(list(range(1, 9)))) / 8
    np.testing.assert_allclose(coming(waiting, np.full(GROUPS, 100.0)), 2 * expected)
    run_until_idle(story.engine)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_real_model_shows_the_rows_it_sent_and_no_padding(tmp_path: Path, batch_invariant: bool) -> None:
    folder = models.save("deepseek_v3", tmp_path)
    args = config(folder, "float32", transport="local", batch_invariant=batch_invariant)
    blueprint = make_blueprint(args)
    runtime = RouterRuntime(blueprint, args.experts, args.router, key=b"k", node="n")
    limits = {"max_batch_tokens": 24, "max_sequences": 8, "max_queued_requests": 8}
    engine = Engine(runtime.backbone, routing=RoutingRecord(runtime.dispatcher, args.experts.groups), **limits)
    submit(engine, make_request(list(range(10, 43)), ignore_eos=True))
    sent = [0] * args.experts.groups
    for tokens in (24, 33):
        engine.turn()
        [sequence] = engine._scheduler.running
        sent = [0] * args.experts.groups
        for layer, rows in runtime.dispatcher.loads().items():
            for expert, count in enumerate(rows.tolist()):
                sent[blueprint.placement.owner[layer][expert]] += count
        assert sequence.shown is not None
        assert (sequence.shown.rows.tolist(), sequence.shown.tokens) == (sent, tokens)
    assert sum(sent) == 33 * 2
    engine.turn()
    assert sequence.shown.tokens == 33
    runtime.stop()


def test_an_engine_without_a_record_remembers_nothing() -> None:
    engine = make_engine(FakeBackbone())
    submit(engine, make_request([1, 2, 3]))
    [sequence] = engine.undecoded()
    run_until_idle(engine)
    assert sequence.shown is None

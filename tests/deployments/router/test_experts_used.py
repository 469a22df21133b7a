"""The experts of a request that asks: against a count by hand over the fake model, and the rows of a real one. 3 s."""

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
from deployments.generation import TokenChunk, union
from deployments.router.engine import Engine
from deployments.router.experts_used import ExpertRecord
from deployments.router.outbox import merge
from deployments.router.runtime import RouterRuntime
from deployments.router.step import StepInput
from tests import models
from tests.deployments.router.fake_backbone import FakeBackbone, Inbox, make_request, run_until_idle, submit
from tests.parity.split_model import config

EXPERTS, LAYERS = 13, (2, 5)


def experts_of(token: int, layer: int) -> list[int]:
    return [token % EXPERTS, (token // 2 + layer) % EXPERTS]


def used_by(tokens: list[int]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted({i for token in tokens for i in experts_of(token, layer)})) for layer in LAYERS}


class FakeLayers:
    """What a dispatcher tells whoever watches it, in the forward pass of the fake model. watched: of each step."""

    def __init__(self) -> None:
        self.watch_experts: Callable[[int, npt.NDArray[np.int64]], None] | None = None
        self.watched: list[bool] = []
        self.fails = False

    def __call__(self, step: StepInput) -> None:
        self.watched.append(self.watch_experts is not None)
        for layer in LAYERS:
            if self.watch_experts is not None:
                self.watch_experts(layer, np.array([experts_of(token, layer) for token in step.tokens]))
            if self.fails:
                raise EngineError("a layer failed")


class Story:
    def __init__(self, num_pages: int = 64, max_batch_tokens: int = 8) -> None:
        self.layers = FakeLayers()
        backbone = FakeBackbone(num_pages=num_pages)
        backbone.before_forward = self.layers
        sizes = {"max_batch_tokens": max_batch_tokens, "max_sequences": 4, "max_queued_requests": 100}
        self.engine = Engine(backbone, experts=ExpertRecord(self.layers), **sizes)

    def submit(self, tokens: list[int], request_id: str = "r", show: bool = True, **sampling: object) -> Inbox:
        request = make_request(tokens, request_id, ignore_eos=True, show_experts=show, **sampling)
        return submit(self.engine, request)


def test_the_first_chunk_has_the_prompt_s_experts_and_each_later_one_those_of_the_token_before() -> None:
    story = Story()
    prompt = [7, 1, 30, 31, 8, 9, 50, 2, 3, 11]
    inbox = story.submit(prompt, max_tokens=4)
    run_until_idle(story.engine)
    tokens = [token for chunk in inbox.chunks for token in chunk.tokens]
    expected = [used_by(prompt), *(used_by([token]) for token in tokens[:-1])]
    assert [chunk.experts for chunk in inbox.chunks] == expected


def test_without_such_a_request_no_step_is_watched_and_chunks_say_nothing() -> None:
    story = Story()
    quiet = story.submit([1, 2, 3], "quiet", show=False, max_tokens=6)
    story.engine.turn()
    asked = story.submit([4], "asked", max_tokens=2)
    run_until_idle(story.engine)
    assert story.layers.watched == [False, True, True, False, False, False]
    assert story.layers.watch_experts is None
    assert {chunk.experts for chunk in quiet.chunks} == {None}
    assert asked.chunks[0].experts == used_by([4])


def test_of_tokens_found_in_the_pool_nothing_is_known() -> None:
    story = Story()
    prompt = [7, 1, 30, 31, 8, 9, 50, 2, 3]
    story.submit(prompt, "first", show=False, max_tokens=2)
    run_until_idle(story.engine)
    again = story.submit(prompt, "again", max_tokens=1)
    run_until_idle(story.engine)
    assert again.cached_tokens() == 8
    assert again.chunks[0].experts == used_by(prompt[8:])


def test_a_step_that_fails_tells_the_next_nothing() -> None:
    story = Story()
    story.layers.fails = True
    story.submit([1, 2, 3], "failed")
    story.engine.turn()
    story.layers.fails = False
    inbox = story.submit([9], "next", max_tokens=1)
    run_until_idle(story.engine)
    assert inbox.chunks[0].experts == used_by([9])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(4, 16))
def test_whatever_the_batch_all_experts_of_a_request_are_those_of_its_computed_tokens(
    prompts: list[list[int]], max_batch_tokens: int
) -> None:
    story = Story(max_batch_tokens=max_batch_tokens)
    inboxes = [
        story.submit([number + 1, *prompt], f"r{number}", show=number % 2 == 0, max_tokens=3)
        for number, prompt in enumerate(prompts)
    ]
    run_until_idle(story.engine)
    for number, (prompt, inbox) in enumerate(zip(prompts, inboxes, strict=True)):
        made = [token for chunk in inbox.chunks for token in chunk.tokens]
        computed = [number + 1, *prompt][inbox.cached_tokens() :] + made[:-1]
        assert union(*(chunk.experts for chunk in inbox.chunks)) == (used_by(computed) if number % 2 == 0 else None)


def test_chunks_that_are_merged_have_the_experts_of_both() -> None:
    first, second = TokenChunk(0, (1,), experts={1: (4, 7)}), TokenChunk(0, (2,), experts={1: (5, 7), 2: (0,)})
    assert merge(first, second).experts == {1: (4, 5, 7), 2: (0,)}
    assert merge(first, TokenChunk(0, (2,))).experts == first.experts
    assert merge(TokenChunk(0, (1,)), TokenChunk(0, (2,))).experts is None


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_real_model_shows_exactly_the_experts_that_got_rows(tmp_path: Path, batch_invariant: bool) -> None:
    folder = models.save("deepseek_v3", tmp_path)
    args = config(folder, "float32", transport="local", batch_invariant=batch_invariant)
    runtime = RouterRuntime(make_blueprint(args), args.experts, args.router, key=b"k", node="n")
    inbox = submit(runtime.engine, make_request(list(range(10, 43)), ignore_eos=True, show_experts=True))
    while not inbox.ended:
        runtime.engine.turn()
    loads = runtime.dispatcher.loads()
    sent = {layer: tuple(np.flatnonzero(rows).tolist()) for layer, rows in sorted(loads.items())}
    assert union(*(chunk.experts for chunk in inbox.chunks)) == sent
    runtime.stop()

"""The engine alone: counts what it generated and computed, shares experts between routers, ends what it started."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from cluster.config import AppConfig
from infra.bench import models
from infra.bench.split_model import SplitModel, _Run

ROUTED_ROWS = 4 * 2
"""Of each token of the demo: four layers, two experts a token."""


@pytest.fixture(scope="module")
def args() -> AppConfig:
    return models.demo().args


@pytest.fixture(scope="module")
def model(args: AppConfig) -> Iterator[SplitModel]:
    with SplitModel(args, routers=2, forked=True) as model:
        yield model


def test_counts_tokens_and_every_row_once(model: SplitModel) -> None:
    done = model.decode(3, prompt_tokens=5, new_tokens=4)
    assert done.tokens == 3 * 4
    # The last token of each sequence is never fed back.
    assert done.rows == 3 * (5 + 4 - 1) * ROUTED_ROWS
    assert 0 < done.batches <= done.rows
    assert done.rows_per_batch == done.rows / done.batches
    assert done.tokens_per_s == pytest.approx(done.tokens / done.wall_s)
    assert 0 < done.step_s_median < done.wall_s
    assert min(done.router_cpu_s, done.experts_cpu_s) > 0


def test_one_new_token_is_a_prefill_without_steps(model: SplitModel) -> None:
    done = model.run(model.prompts(2, 8), 1)
    assert (done.tokens, done.steps_s) == (2, ())


def test_a_prompt_that_was_run_before_is_not_computed_again(model: SplitModel) -> None:
    prompts = model.prompts(1, 65)
    first, again = (model.run(prompts, 1, routers=1) for _ in range(2))
    assert first.rows == 65 * ROUTED_ROWS
    assert again.rows == (65 - 64) * ROUTED_ROWS


def test_a_request_that_cannot_run_is_an_error_and_the_model_goes_on(model: SplitModel) -> None:
    with pytest.raises(RuntimeError, match="RequestError"):
        model.decode(1, prompt_tokens=5000, new_tokens=1)
    assert model.decode(1, prompt_tokens=4, new_tokens=2).tokens == 2


def test_local_experts_need_no_process_and_count_no_rows(args: AppConfig) -> None:
    with SplitModel(args, local=True, forked=True) as model:
        done = model.decode(2, prompt_tokens=4, new_tokens=3)
    assert (done.tokens, done.rows, done.experts_cpu_s) == (6, 0, 0)


def test_leaves_no_process_behind(args: AppConfig) -> None:
    before = _descendants()
    with SplitModel(args) as model:
        model.decode(1, prompt_tokens=4, new_tokens=2)
        assert len(_descendants() - before) >= 5
    assert not {process for process in _descendants() - before if "spawn_main" in " ".join(process.cmdline())}


def test_steps_are_counted_while_all_sequences_decode() -> None:
    run = _Run(0.0, 9.0, 0.0, [[1.0, 2.0, 3.0, 5.0, 6.0], [2.5, 3.5, 5.5, 7.0]])
    assert run.steps_s() == [2.0, 1.0, 1.0, 2.0]


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))

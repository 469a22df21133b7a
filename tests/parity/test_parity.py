"""The first promise: the split model says exactly what the whole one says, for every model type that must work.

Four expert processes, rows over sockets, no Ray. Eight prompts of different length join one batch at different times;
every token must be that of transformers' `generate`, prompt by prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import AppConfig, ExpertsSpec, RouterSpec, parse_args
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.router.runtime import RouterRuntime
from tests.expert_pool import KEY, NODE, ExpertPool, Started, view_of
from tests.models import MODEL_TYPES, VOCABULARY, save
from tests.reference import Continuation, compare, continuations

TOKENS = 24
PROMPT_LENGTHS = (7, 20, 3, 33, 12, 1, 26, 5)
END_S = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[ExpertPool]:
    with ExpertPool(4) as pool:
        yield pool


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def config(folder: Path, dtype: str, groups: int = 4, **router: object) -> AppConfig:
    return parse_args(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "experts": {"groups": groups, "wait_s": 5, "timeout_s": 20},
            # Small chunks and pages that do not divide the prompts: joins, chunk borders and page borders all occur.
            "router": {"max_batch_tokens": 24, "max_sequences": 8, "kv_tokens": 1024, **router},
        }
    )


def collect(routers: Sequence[RouterRuntime], requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Run the requests, spread over the routers, each joining when the one before it has its first token."""
    outputs: list[list[int]] = [[] for _ in requests]
    failures: list[Exception] = []
    started = [threading.Event() for _ in requests]
    ended = [threading.Event() for _ in requests]

    def emit(number: int, item: TokenChunk | Exception) -> None:
        if isinstance(item, Exception):
            failures.append(item)
        else:
            outputs[number].extend(item.tokens)
        started[number].set()
        if isinstance(item, Exception) or item.finish_reason is not None:
            ended[number].set()

    for number, request in enumerate(requests):
        router = routers[number % len(routers)]
        router.engine.submit(request, lambda item, number=number: emit(number, item))  # type: ignore[misc]
        assert started[number].wait(END_S)
    for event in ended:
        assert event.wait(END_S)
    assert not failures, failures
    return outputs


def greedy(number: int, prompt: Sequence[int]) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=TOKENS, seed=0, temperature=0.0, ignore_eos=True)
    return GenerationRequest(f"request-{number}", tuple(prompt), sampling, prompt_tokens=len(prompt))


def answers(args: AppConfig, blueprint: Blueprint, started: list[Started], routers: int = 1) -> list[list[int]]:
    """The tokens of all prompts from the split model."""
    view = view_of(started)
    running = [make_router(args.experts, args.router, blueprint) for _ in range(routers)]
    try:
        for router in running:
            router.dispatcher.update(view)
            router.start()
        return collect(running, [greedy(number, prompt) for number, prompt in enumerate(prompts())])
    finally:
        for router in running:
            router.stop()


def make_router(experts: ExpertsSpec, router: RouterSpec, blueprint: Blueprint) -> RouterRuntime:
    return RouterRuntime(blueprint, experts, router, key=KEY, node=NODE)


def near_ties(reference: Sequence[Continuation], outputs: Sequence[Sequence[int]]) -> int:
    """How many prompts left the reference at a near tie; any other difference fails the test."""
    compared = [compare(wanted, got) for wanted, got in zip(reference, outputs, strict=True)]
    wrong = [(number, each) for number, each in enumerate(compared) if not each.equal and not each.near_tie]
    assert not wrong, f"tokens differ where the reference was decided: {wrong}"
    return sum(not each.equal for each in compared)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_split_model_says_what_the_whole_model_says(
    model_type: str, pool: ExpertPool, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    save(model_type, tmp_path, torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the checkpoint must have several shards"
    args = config(tmp_path, "float32")
    blueprint = make_blueprint(args)
    started = pool.serve(blueprint, args.experts)
    assert not any(each.imported_transformers for each in started)
    ties = near_ties(continuations(tmp_path, torch.float32, prompts(), TOKENS), answers(args, blueprint, started))
    record_property("near_ties", ties)
    assert ties == 0, "expected none; a near tie is not an error, but it must be looked at"

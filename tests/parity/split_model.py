"""The split model as the parity tests run it: engine and backbone here, experts wherever the view says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from cluster.blueprint import Blueprint
from cluster.config import AppConfig, parse_args
from cluster.membership import View
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.router.runtime import RouterRuntime
from tests.expert_pool import KEY, NODE
from tests.models import VOCABULARY
from tests.reference import Continuation, compare

TOKENS = 24
PROMPT_LENGTHS = (7, 20, 3, 33, 12, 1, 26, 5)
END_S = 60.0


def prompts() -> list[list[int]]:
    """Eight prompts of different length."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def config(folder: Path, dtype: str, *, groups: int = 4, transport: str = "stream", **router: object) -> AppConfig:
    """Small chunks and pages that do not divide the prompts: joins, chunk borders and page borders all occur."""
    experts = {"groups": groups, "transport": transport, "wait_s": 5, "timeout_s": 20}
    routers = {"max_batch_tokens": 24, "max_sequences": 8, "kv_tokens": 1024, **router}
    return parse_args({"model": {"path": str(folder), "dtype": dtype}, "experts": experts, "router": routers})


def greedy(number: int, prompt: Sequence[int]) -> GenerationRequest:
    """A request whose answer `generate` gives too."""
    sampling = SamplingParams(max_tokens=TOKENS, seed=0, temperature=0.0, ignore_eos=True)
    return GenerationRequest(f"request-{number}", tuple(prompt), sampling, prompt_tokens=len(prompt))


def answers(
    args: AppConfig,
    blueprint: Blueprint,
    view: View,
    requests: Sequence[GenerationRequest],
    *,
    routers: int = 1,
    midway: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens of all requests, which are spread over the routers and join one after the other.

    midway: called when half of the requests have joined.
    """
    running = [RouterRuntime(blueprint, args.experts, args.router, key=KEY, node=NODE) for _ in range(routers)]
    try:
        for router in running:
            router.dispatcher.update(view)
            router.start()
        return _collect(running, requests, midway)
    finally:
        for router in running:
            router.stop()


def _collect(
    routers: Sequence[RouterRuntime], requests: Sequence[GenerationRequest], midway: Callable[[], None]
) -> list[list[int]]:
    """Each request joins the batch when the one before it has its first token."""
    outputs: list[list[int]] = [[] for _ in requests]
    failures: list[Exception] = []
    started = [threading.Event() for _ in requests]
    ended = [threading.Event() for _ in requests]

    def emit(number: int, item: TokenChunk | Exception) -> None:
        failed = isinstance(item, Exception)
        if isinstance(item, Exception):
            failures.append(item)
        else:
            outputs[number].extend(item.tokens)
        started[number].set()
        if failed or item.finish_reason is not None:
            ended[number].set()

    for number, request in enumerate(requests):
        routers[number % len(routers)].engine.submit(request, partial(emit, number))
        assert started[number].wait(END_S)
        if number == len(requests) // 2:
            midway()
    for event in ended:
        assert event.wait(END_S)
    assert not failures, failures
    return outputs


def near_ties(reference: Sequence[Continuation], outputs: Sequence[Sequence[int]]) -> int:
    """How many prompts left the reference at a near tie; any other difference fails the test."""
    compared = [compare(wanted, got) for wanted, got in zip(reference, outputs, strict=True)]
    wrong = [(number, each) for number, each in enumerate(compared) if not each.equal and not each.near_tie]
    assert not wrong, f"tokens differ where the reference was decided: {wrong}"
    return sum(not each.equal for each in compared)

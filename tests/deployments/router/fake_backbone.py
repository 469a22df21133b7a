"""A model small enough to predict, and honest about the pool: what it reads as context went through the pages.

The logits of a row are a function of the token ids found in the pages of its sequence, so a wrong page, slice, position
or reused prefix shows as a wrong token. `expected` computes the same without pages, one request at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.router.engine import Engine
from deployments.router.sampler import Sampled, sample
from deployments.router.sequence import Sequence, make_sequences
from deployments.router.step import StepInput

EOS = 0
POISON = 63
"""A context that ends with this token yields NaN logits; no other context yields it."""


class FakeBackbone:
    """The engine's `BackboneLike`. `before_forward` is called with each step first and may raise."""

    vocab_size = 64
    eos_token_ids = frozenset({EOS})

    def __init__(self, *, page_tokens: int = 4, num_pages: int = 64, max_context: int = 100) -> None:
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self.max_context = max_context
        self.before_forward: Callable[[StepInput], None] | None = None
        self.steps: list[tuple[int, ...]] = []
        """The slice lengths of each step."""
        self._slots: dict[tuple[int, int], int] = {}

    def forward(self, step: StepInput) -> Tensor:
        check_step(step, self.page_tokens)
        self.steps.append(tuple(part.length for part in step.slices))
        if self.before_forward is not None:
            self.before_forward(step)
        contexts: dict[int, list[int]] = {}
        for part in step.slices:
            for row in range(part.start, part.start + part.length):
                self._slots[self._slot(part.pages, step.positions[row])] = step.tokens[row]
        for part in step.slices:
            for row in range(part.start, part.start + part.length):
                slots = (self._slot(part.pages, position) for position in range(step.positions[row] + 1))
                contexts[row] = [self._slots[slot] for slot in slots]
        rows = [fake_logits(contexts[row]) for row in step.logits_rows]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def _slot(self, pages: object, position: int) -> tuple[int, int]:
        assert isinstance(pages, list)
        return pages[position // self.page_tokens], position % self.page_tokens


def check_step(step: StepInput, page_tokens: int) -> None:
    """What every step promises, whatever the workload."""
    assert len(step.tokens) == len(step.positions) == sum(part.length for part in step.slices) > 0
    lengths = [part.length for part in step.slices]
    assert all(length == 1 for length in lengths[: step.decode_slices])
    assert all(length > 1 for length in lengths[step.decode_slices :])
    written: set[int] = set()
    start = 0
    for part in step.slices:
        assert part.start == start
        start += part.length
        first = part.context_tokens - part.length
        assert list(step.positions[part.start : start]) == list(range(first, part.context_tokens))
        assert len(set(part.pages)) == len(part.pages) >= -(-part.context_tokens // page_tokens)
        targets = set(part.pages[first // page_tokens : -(-part.context_tokens // page_tokens)])
        assert not targets & written, "two sequences write to one page"
        written |= targets


def fake_logits(context: list[int]) -> Tensor:
    """Logits [V] that depend on every token of the context and its place."""
    if context[-1] == POISON:
        return torch.full((FakeBackbone.vocab_size,), torch.nan)
    seed = int.from_bytes(blake2b(repr(context).encode(), digest_size=7).digest(), "little")
    logits = torch.randn(FakeBackbone.vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    logits[POISON] = -torch.inf
    return logits


def expected(request: GenerationRequest, backbone: FakeBackbone) -> dict[int, tuple[list[int], str | None]]:
    """New tokens and finish reason per choice, computed alone and from the whole context at every token."""
    result: dict[int, tuple[list[int], str | None]] = {}
    for sequence in make_sequences(request, backbone, 0):
        while sequence.finish_reason is None:
            sequence.append(_next_token(sequence), backbone.eos_token_ids)
        result[sequence.choice] = (sequence.tokens[len(request.tokens) :], sequence.finish_reason)
    return result


def _next_token(sequence: Sequence) -> int:
    [outcome] = sample(fake_logits(sequence.tokens)[None], [sequence])
    assert isinstance(outcome, Sampled)
    return outcome.token


def make_request(
    tokens: list[int], request_id: str = "r", prompt_tokens: int | None = None, **sampling: object
) -> GenerationRequest:
    """A greedy request of 8 tokens unless told otherwise; request fields by name, the rest is sampling."""
    names = ("timeout_s", "choice", "accepted", "show_experts", "x_request_id")
    fields = {key: sampling.pop(key) for key in names if key in sampling}
    params = SamplingParams(**({"max_tokens": 8, "seed": 0, "temperature": 0.0} | sampling))  # type: ignore[arg-type]
    prompt = len(tokens) if prompt_tokens is None else prompt_tokens
    return GenerationRequest(request_id, tuple(tokens), params, prompt, **fields)  # type: ignore[arg-type]


class Inbox:
    """What a request emitted; checks that nothing follows its end."""

    def __init__(self, choices: int = 1) -> None:
        self.chunks: list[TokenChunk] = []
        self.error: Exception | None = None
        self._open = choices

    def __call__(self, item: TokenChunk | Exception) -> None:
        assert not self.ended, f"{item} came after the end"
        if isinstance(item, Exception):
            self.error = item
        else:
            self.chunks.append(item)
            self._open -= item.finish_reason is not None

    @property
    def ended(self) -> bool:
        return self.error is not None or self._open == 0

    @property
    def result(self) -> dict[int, tuple[list[int], str | None]]:
        """Tokens and finish reason per choice, as `expected` returns them."""
        result: dict[int, tuple[list[int], str | None]] = {}
        for chunk in self.chunks:
            tokens, _ = result.get(chunk.choice, ([], None))
            result[chunk.choice] = (tokens + list(chunk.tokens), chunk.finish_reason)
        return result

    def cached_tokens(self, choice: int = 0) -> int:
        return sum(chunk.cached_tokens for chunk in self.chunks if chunk.choice == choice)


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(backbone: FakeBackbone, clock: Callable[[], float] | None = None, **limits: Any) -> Engine:
    """An engine that is not started: tests turn it by hand."""
    limits = {"max_batch_tokens": 16, "max_sequences": 4, "max_queued_requests": 100} | limits
    return Engine(backbone, clock=clock or FakeClock(), **limits)


def submit(engine: Engine, request: GenerationRequest) -> Inbox:
    inbox = Inbox(request.sampling.n)
    engine.submit(request, inbox)
    return inbox


def turns(engine: Engine, limit: int = 2000) -> Iterator[int]:
    """Turn the engine until it has nothing to do; fails after `limit` steps."""
    for count in range(limit):
        if not engine.turn():
            return
        yield count
    raise AssertionError(f"the engine is still busy after {limit} steps")


def run_until_idle(engine: Engine) -> None:
    for _ in turns(engine):
        pass
    engine.check_idle()

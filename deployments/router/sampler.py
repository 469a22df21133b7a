"""From logits to tokens: penalties, filters, draw, and log-probabilities, each row by its own request's parameters.

Order and meaning of the processors are those of transformers' `generate`: logit bias, repetition penalty, (presence
and frequency penalties as OpenAI defines them), temperature, top-k, top-p, min-p; where transformers has one, it is
used. A row's token depends on its own logits and (seed, choice, position) alone: rows are grouped only to be
processed together. Knows no pages, no steps and no stop rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.errors import EngineError
from deployments.generation import SamplingParams, TokenLogprob
from deployments.router.noise import draw, draw_sparse, noise_key
from deployments.router.sequence import Sequence

# Below this the quotient logit / temperature leaves float32's range for large logits, and the limit is greedy anyway.
GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a row, and its log-probability where the request asks for it."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class _Filters:
    """What rows must have in common to be filtered in one call."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @property
    def sparse(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled | EngineError]:
    """The next token of each sequence from `logits` float32 [S, V], row by row; a row without a finite maximum
    (NaN, overflow) yields the error its request is to fail with, and disturbs no other row."""
    tokens, usable = _greedy(logits)
    groups: dict[_Filters, list[int]] = {}
    scores = logits
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if not usable[row]:
            continue
        if _adjusts(sampling):
            scores = logits.clone() if scores is logits else scores
            scores[row] = _adjust(logits[row : row + 1], sequence)[0]
            tokens[row] = int(scores[row].argmax())
        if sampling.temperature >= GREEDY_BELOW:
            filters = _Filters(float(sampling.temperature), sampling.top_k, sampling.top_p, sampling.min_p)
            groups.setdefault(filters, []).append(row)
    for filters, rows in groups.items():
        drawn = _draw(scores[rows], filters, [sequences[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return [
        Sampled(tokens[row], _logprob(logits[row], tokens[row], sequence.request.sampling.logprobs))
        if usable[row]
        else EngineError("The model returned logits that are not finite.")
        for row, sequence in enumerate(sequences)
    ]


def filter_scores(scores: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Scores [S, V] divided by the temperature, with -inf for tokens outside top-k, top-p and min-p (0, 1, 0: off)."""
    unused = torch.empty(0, dtype=torch.int64)
    if temperature != 1:
        scores = TemperatureLogitsWarper(temperature)(unused, scores)
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(unused, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(unused, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(unused, scores)
    return scores


def _greedy(logits: Tensor) -> tuple[list[int], list[bool]]:
    """The first best token of each row, and whether its logit is finite (NaN counts as the best)."""
    if logits.device.type != "cpu":
        best, indices = logits.max(dim=-1)
        return indices.tolist(), best.isfinite().tolist()
    # numpy searches a row of 4096 in 0.3 us, torch in 4.
    rows = logits.numpy()
    found = rows.argmax(-1)
    return found.tolist(), np.isfinite(rows[np.arange(len(rows)), found]).tolist()


def _draw(scores: Tensor, filters: _Filters, sequences: list[Sequence]) -> list[int]:
    keys = [noise_key(s.request.sampling.seed, s.choice, s.output_tokens) for s in sequences]
    filtered = filter_scores(
        scores, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p
    )
    rule = draw_sparse if filters.sparse else draw
    drawn: list[int] = rule(filtered.softmax(dim=-1), torch.tensor(keys, device=scores.device)).tolist()
    return drawn


def _adjusts(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _adjust(scores: Tensor, sequence: Sequence) -> Tensor:
    """Scores [1, V] of one sequence with its bias and penalties."""
    sampling, device = sequence.request.sampling, scores.device
    scores = scores.clone()
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=device)
        scores[0, biased] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype, device=device)
    if sampling.repetition_penalty != 1:
        history = torch.tensor([sequence.tokens], device=device)
        scores = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(history, scores)
    output = sequence.tokens[sequence.request.prompt_tokens :]
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.unique(torch.tensor(output, device=device), return_counts=True)
        scores[0, seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores


def _logprob(logits: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs = logits.log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(alternatives, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)

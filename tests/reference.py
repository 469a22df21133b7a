"""What transformers itself generates from a checkpoint, one prompt at a time, and where it was undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4
"""Logits closer than this are no decision: the design's bound for fp32."""


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens, and at each of them how far the best logit lay above the second best."""

    tokens: list[int]
    margins: list[float]


@torch.no_grad()
def continuations(
    folder: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], tokens: int
) -> list[Continuation]:
    """Greedy continuations of `tokens` tokens by the whole model, prompt by prompt (grouped_mm)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm").eval()
    model.generation_config.eos_token_id = None  # as `ignore_eos` does: the end of a sequence is a token like others
    return [_continue(model, list(prompt), tokens) for prompt in prompts]


def _continue(model: torch.nn.Module, prompt: list[int], tokens: int) -> Continuation:
    ids = torch.tensor([prompt])
    result = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [row[0].float().topk(2).values for row in result.logits]
    return Continuation(result.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best])


@dataclass(frozen=True)
class Comparison:
    """first_difference: position, or None where all tokens are equal. margin: the reference's own at that position."""

    first_difference: int | None
    margin: float | None

    @property
    def equal(self) -> bool:
        """Every token is the same."""
        return self.first_difference is None

    @property
    def near_tie(self) -> bool:
        """They differ first where the reference was undecided; what follows has no reference any more."""
        return self.margin is not None and self.margin < NEAR_TIE


def compare(reference: Continuation, tokens: Sequence[int]) -> Comparison:
    """Where `tokens` leave the reference."""
    for position, (wanted, got) in enumerate(zip(reference.tokens, tokens, strict=True)):
        if wanted != got:
            return Comparison(position, reference.margins[position])
    return Comparison(None, None)

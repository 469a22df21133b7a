"""Drive a backbone the way the engine does, but by plan: pages in disorder, chunks of chosen sizes, staggered joins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deployments.router.step import BackboneLike, SequenceSlice, StepInput


@dataclass(eq=False)
class Running:
    """One sequence: its tokens so far, how many have keys, its pages, and what came out of the model."""

    tokens: list[int]
    chunk: int
    done: int = 0
    pages: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def next_length(self) -> int:
        """Tokens of the next step."""
        return min(self.chunk, len(self.tokens) - self.done)


class Driver:
    """Runs sequences over `backbone`, a new one joining every `join_every` steps (0: all at once)."""

    def __init__(self, backbone: BackboneLike, *, join_every: int = 2, seed: int = 0) -> None:
        self._backbone = backbone
        self._join_every = join_every
        self._free = list(range(backbone.num_pages))
        random.Random(seed).shuffle(self._free)

    def score(self, prompts: Sequence[Sequence[int]], chunks: Sequence[int]) -> list[Tensor]:
        """Logits [tokens, V] of every token of every prompt; prompt i runs in chunks of chunks[i % len(chunks)]."""
        everything = [Running(list(prompt), chunks[i % len(chunks)]) for i, prompt in enumerate(prompts)]
        self._run(everything, 0)
        return [torch.stack(sequence.logits) for sequence in everything]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, chunk: int) -> list[list[int]]:
        """`tokens` greedy tokens per prompt."""
        everything = [Running(list(prompt), chunk) for prompt in prompts]
        self._run(everything, tokens)
        return [sequence.tokens[-tokens:] for sequence in everything]

    def _run(self, waiting: list[Running], generate: int) -> None:
        waiting, running, step = list(waiting), [], 0
        ends = {id(sequence): len(sequence.tokens) + generate for sequence in waiting}
        while waiting or running:
            joining = len(waiting) if not self._join_every else int(step % self._join_every == 0)
            running += [waiting.pop(0) for _ in range(min(joining, len(waiting)))]
            if running:
                self._step(sorted(running, key=lambda each: each.next_length != 1), ends, generate > 0)
            # The last token generated needs no keys of its own.
            left = [each for each in running if each.done < ends[id(each)] - (generate > 0)]
            self._free += [page for each in running if each not in left for page in each.pages]
            running, step = left, step + 1

    def _step(self, running: list[Running], ends: dict[int, int], greedy: bool) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        slices: list[SequenceSlice] = []
        owners: list[Running] = []
        for each in running:
            first, length = each.done, each.next_length
            each.done += length
            while len(each.pages) * self._backbone.page_tokens < each.done:
                each.pages.append(self._free.pop())
            slices.append(SequenceSlice(len(tokens), length, each.done, list(each.pages)))
            tokens += each.tokens[first : each.done]
            positions += range(first, each.done)
            owners += [each] * length
        rows = [part.start + part.length - 1 for part in slices] if greedy else range(len(tokens))
        for row, logits in zip(rows, self._backbone.forward(StepInput(tokens, positions, slices, rows)), strict=True):
            owner = owners[row]
            if not greedy:
                owner.logits.append(logits)
            elif owner.done == len(owner.tokens) < ends[id(owner)]:
                owner.tokens.append(int(logits.argmax()))

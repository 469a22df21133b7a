"""One step as the engine hands it to the model: packed tokens, where each sequence lies, which logits are wanted.

Plain data without torch, so the scheduler and its tests need none. Knows no requests, no sampling, no queue.

    tokens     [T]  decode rows first, then prefill chunks, packed without padding, at least one
    positions  [T]  position of each token in its sequence
    slices     one per sequence, half-open [start, start + length) of the packed tokens, in packed order;
               those of length 1 before all longer ones, whether they decode or end a prompt
    pages      page ids of the sequence; key j of it lies in pages[j // page_tokens] at slot j % page_tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SequenceSlice:
    """The part of a step that belongs to one sequence.

    start: offset of its first token in the packed tokens. length: its tokens in this step; 1 when decoding.
    context_tokens: its keys once this step's are written, these included: positions [0, context_tokens).
    pages: enough pages for `context_tokens`, in order; possibly more. Valid during the step, not after it.
    """

    start: int
    length: int
    context_tokens: int
    pages: Sequence[int]


@dataclass(frozen=True)
class StepInput:
    """One forward pass. `logits_rows` are the packed rows whose logits are wanted: S of them, possibly none."""

    tokens: Sequence[int]
    positions: Sequence[int]
    slices: Sequence[SequenceSlice]
    logits_rows: Sequence[int]

    @property
    def decode_slices(self) -> int:
        """How many of the first slices have length 1."""
        return next((i for i, part in enumerate(self.slices) if part.length != 1), len(self.slices))


class BackboneLike(Protocol):
    """What the engine needs of a model. `forward` is called from the engine's thread only."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, V."""

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence the model takes, prompt and output together."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""

    @property
    def page_tokens(self) -> int:
        """Tokens whose keys and values one page holds."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool; page ids are 0 .. num_pages - 1."""

    def forward(self, step: StepInput) -> Tensor:
        """Write the keys and values of the step's tokens into their pages; logits [S, V] in float32."""

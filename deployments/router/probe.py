"""A short self-check at start-up: does the packed, paged model compute what the model itself computes?

Two made-up sequences run once through the model as transformers runs it, uncached, and once as the engine will: in
chunks, packed together, then as decode rows, over pages in disorder. A model whose attention goes round the attention
interface, or that keeps state besides keys and values, cannot agree. With batch invariance the same tokens run again,
one by one and four copies side by side, and must give the same bits. The experts play no part: their servers may not
be up yet, so the caller silences them (backbone.py). Five forward passes of a few tokens; eighteen more for the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cluster.errors import ConfigError, UnsupportedModelError
from deployments.router.step import SequenceSlice, StepInput

PAGE_TOKENS = 4
NUM_PAGES = 12

# A wrong mask or a lost state changes the logits of every later row by their own size. Another order of summation
# changes them by rounding; in 16-bit types that may even flip the choice of an expert in single rows, hence the median.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_LENGTHS = (12, 5)
_PAGES = ((4, 1, 5), (0, 2, 3), (11, 10, 9), (8, 7, 6))
# The steps: (sequence, tokens of it) in packed order, decode rows first.
_PACKED = (((0, 6), (1, 3)), ((1, 1), (0, 5)), ((0, 1), (1, 1)))
_LATER_ROWS = (6, 2)
_SINGLE = tuple(((sequence, 1),) for sequence in (0, 1) for _ in range(_LENGTHS[sequence]))
_COPIES = (tuple((copy, _LENGTHS[0]) for copy in range(4)),)

Forward = Callable[[StepInput], Tensor]


def probe_tokens(vocab_size: int) -> list[list[int]]:
    """The two sequences: fixed, and spread over the vocabulary."""
    return [[(7919 * index + 13 * which + 5) % vocab_size for index in range(_LENGTHS[which])] for which in (0, 1)]


def check_agreement(whole: Sequence[Tensor], forward: Forward, vocab_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Compare `forward` over the probe's steps with `whole`, the uncached logits [tokens, V] per sequence.

    Returns the packed logits, per sequence.

    Raises:
        UnsupportedModelError: they disagree.
    """
    packed = _run(forward, probe_tokens(vocab_size), _PACKED)
    errors = [_relative_errors(*pair)[-rows:] for *pair, rows in zip(whole, packed, _LATER_ROWS, strict=True)]
    error = torch.cat(errors).median().item()
    if not error <= _TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"The model gives other logits with packed sequences and a paged cache than without (relative error "
            f"{error:.2g}): its attention goes round transformers' attention interface, or it keeps more state "
            "than keys and values."
        )
    return packed


def check_invariance(packed: Sequence[Tensor], forward: Forward, vocab_size: int) -> None:
    """Run the probe token by token, and four times in one step, and demand the bits of `packed`.

    Raises:
        ConfigError: batch invariance does not hold for this model on this machine.
    """
    tokens = probe_tokens(vocab_size)
    found = [*_run(forward, tokens, _SINGLE), *_run(forward, [tokens[0]] * 4, _COPIES)]
    for expected, other in zip([*packed, *[packed[0]] * 4], found, strict=True):
        if not torch.equal(expected, other):
            raise ConfigError(
                "router.batch_invariant: true is not possible here: this model's results on this device depend on the "
                f"batch (by {(expected - other).abs().max().item():.2g})."
            )


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    """Per row of two [tokens, V]: the norm of the difference over the norm."""
    expected = expected.float()
    difference = (found - expected).square().sum(-1)
    return (difference / expected.square().sum(-1).clamp_min(1e-12)).sqrt()


def _run(forward: Forward, tokens: list[list[int]], plan: Iterable[Sequence[tuple[int, int]]]) -> list[Tensor]:
    logits: list[list[Tensor]] = [[] for _ in tokens]
    for step, owners in _steps(tokens, plan):
        for which, rows in zip(owners, forward(step), strict=True):
            logits[which].append(rows)
    return [torch.stack(rows) for rows in logits]


def _steps(tokens: list[list[int]], plan: Iterable[Sequence[tuple[int, int]]]) -> Iterator[tuple[StepInput, list[int]]]:
    """Every step with the sequence each of its rows belongs to; the logits of all rows are wanted."""
    done = [0] * len(tokens)
    for parts in plan:
        slices: list[SequenceSlice] = []
        positions: list[int] = []
        owners: list[int] = []
        for which, length in parts:
            first, done[which] = done[which], done[which] + length
            slices.append(SequenceSlice(len(positions), length, done[which], _PAGES[which]))
            positions += range(first, done[which])
            owners += [which] * length
        packed = [tokens[which][position] for which, position in zip(owners, positions, strict=True)]
        yield StepInput(packed, positions, slices, range(len(packed))), owners

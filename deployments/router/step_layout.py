"""Where the keys of a step lie: page tables, masks and buckets, built once per step and shared by all layers.

Decode rows (slices of one token, first in the step) attend together. Their contexts differ, so a bucket pads the page
tables of its rows to its longest: sorted by length, a bucket ends where the next context is below half of its longest,
so at most half of what is gathered is padding. Only the last bucket, where nothing is longer than `SMALL_KEYS`, takes
all that is left, because a short row costs less than a call:

    contexts  900 700 500 | 400 260 210 | 90 70 8

Index arithmetic is numpy's: 1 us a call on small arrays, against 4 to 7 us in torch.
Knows no tensors of keys and no model; attention.py and attention_invariant.py read this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deployments.router.step import SequenceSlice

SMALL_KEYS = 128


@dataclass(frozen=True)
class DecodeBucket:
    """B decode rows that attend in one call.

    rows: [B] their places in the step, None when they are all decode rows in order. pages: [B, P].
    bias: [B, 1, 1, P * page_tokens], 0 where a key counts and -inf elsewhere.
    """

    rows: Tensor | None
    pages: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Q consecutive tokens of one sequence. pages: [1, P]. keys: how many of the gathered keys there are.

    bias: [Q, P * page_tokens] like a bucket's; None when plain causal masking over `keys` == Q keys does.
    """

    start: int
    length: int
    pages: Tensor
    keys: int
    bias: Tensor | None


class StepLayout:
    """The geometry of one step; every list is built at its first use, per sliding window.

    slots: [T] where the step's rows are written. fresh_pages: those it writes from their first row on.
    dtype: of the masks. `sink` adds the null page behind the others: a key of zeros whose mask entry is free for an
    attention sink.
    """

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        decode_rows: int,
        page_tokens: int,
        null_page: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slices = slices
        self.decode_rows = decode_rows
        self.page_tokens = page_tokens
        self.null_page = null_page
        self._dtype = dtype
        self._device = device
        self._decode: dict[tuple[int | None, bool], list[DecodeBucket]] = {}
        self._prefill: dict[tuple[int | None, bool], list[PrefillChunk]] = {}
        slots = [slot for part in slices for slot in self._slots(part)]
        self.slots = self._indices(slots)
        self.fresh_pages = self._indices([slot // page_tokens for slot in slots if slot % page_tokens == 0])

    def decode(self, window: int | None, sink: bool) -> list[DecodeBucket]:
        """Buckets of the decode rows."""
        if (window, sink) not in self._decode:
            self._decode[window, sink] = self._buckets(window, sink) if self.decode_rows else []
        return self._decode[window, sink]

    def prefill(self, window: int | None, sink: bool) -> list[PrefillChunk]:
        """One entry per slice that is no decode row."""
        if (window, sink) not in self._prefill:
            chunks = [self._chunk(part, window, sink) for part in self.slices[self.decode_rows :]]
            self._prefill[window, sink] = chunks
        return self._prefill[window, sink]

    def _slots(self, part: SequenceSlice) -> list[int]:
        size = self.page_tokens
        first = part.context_tokens - part.length
        return [part.pages[key // size] * size + key % size for key in range(first, part.context_tokens)]

    def _page_span(self, part: SequenceSlice, window: int | None) -> tuple[int, int]:
        """Half-open range of the pages whose keys some token of `part` sees."""
        oldest = 0 if window is None else max(0, part.context_tokens - part.length + 1 - window)
        return oldest // self.page_tokens, -(-part.context_tokens // self.page_tokens)

    def _buckets(self, window: int | None, sink: bool) -> list[DecodeBucket]:
        spans = [self._page_span(part, window) for part in self.slices[: self.decode_rows]]
        pages = [end - begin for begin, end in spans]
        small = -(-SMALL_KEYS // self.page_tokens)
        groups: list[list[int]] = []
        for row in sorted(range(self.decode_rows), key=lambda row: -pages[row]):
            longest = pages[groups[-1][0]] if groups else 0
            if groups and (2 * pages[row] >= longest or longest <= small):
                groups[-1].append(row)
            else:
                groups.append([row])
        if len(groups) == 1:
            return [self._bucket(range(self.decode_rows), spans, window, sink, in_order=True)]
        return [self._bucket(sorted(group), spans, window, sink, in_order=False) for group in groups]

    def _bucket(
        self, rows: Sequence[int], spans: list[tuple[int, int]], window: int | None, sink: bool, *, in_order: bool
    ) -> DecodeBucket:
        width = max(spans[row][1] - spans[row][0] for row in rows) + sink
        tables, ends, starts = [], [], []
        for row in rows:
            part, (begin, end) = self.slices[row], spans[row]
            tables.append([*part.pages[begin:end], *[self.null_page] * (width - end + begin)])
            ends.append(part.context_tokens - begin * self.page_tokens)
            starts.append(0 if window is None else max(0, ends[-1] - window))
        key = np.arange(width * self.page_tokens)
        seen = key < np.array(ends)[:, None]
        if window is not None:
            seen &= key >= np.array(starts)[:, None]
        return DecodeBucket(
            rows=None if in_order else self._indices(rows),
            pages=self._indices(tables),
            bias=self._bias(seen)[:, None, None],
        )

    def _chunk(self, part: SequenceSlice, window: int | None, sink: bool) -> PrefillChunk:
        begin, end = self._page_span(part, window)
        table = [*part.pages[begin:end], *[self.null_page] * sink]
        keys = part.context_tokens - begin * self.page_tokens
        bias = None
        if sink or keys != part.length or (window is not None and keys > window):
            query = np.arange(keys - part.length, keys)[:, None]
            key = np.arange(len(table) * self.page_tokens)
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            bias = self._bias(seen)
        return PrefillChunk(part.start, part.length, self._indices([table]), keys, bias)

    def _indices(self, numbers: Sequence[object]) -> Tensor:
        return torch.from_numpy(np.array(numbers, dtype=np.int64)).to(self._device)

    def _bias(self, seen: npt.NDArray[np.bool_]) -> Tensor:
        bias = np.where(seen, np.float32(0), np.float32("-inf"))
        return torch.from_numpy(bias).to(self._device, self._dtype)

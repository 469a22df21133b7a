"""Rows of one MoE layer, sorted by (group, expert), and the sum of their results: arithmetic on indices, nothing else.

A router's gate gives every token K experts. `LayerTable.pack` turns that into one contiguous run of rows per group,
within it one run per expert, with one sort and one count; `SortedRows` gathers the rows of all groups at once;
`Results` takes results run by run and puts every row back where its (token, expert) pair was; `combine` is the sum rule
of transformers' `grouped_mm` experts. Knows no replica, no transport and no clock. The naive loop over rows is its
oracle in the tests.

Indices are computed in numpy: a call on a few dozen integers costs 1 us there and 4 to 7 us in torch, and sorting
16-bit keys is a radix sort.
Dimension letters: T tokens, K experts per token, E experts, H hidden, R rows (R == T * K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.fabric.words import Words, as_words, word_type


class GroupRows(NamedTuple):
    """The rows of one group: `start` to `stop` in sorted order. counts: int64, rows per expert the group holds."""

    group: int
    start: int
    stop: int
    counts: npt.NDArray[np.int64]


class Packed(NamedTuple):
    """All rows of one layer in sorted order.

    order: int64 [R], which (token, expert) pair, as token * K + k, stands at each place.
    token: int64 [R], the token of each row.
    groups: the groups that have rows, in order of group index; their runs cover 0 to R.
    counts: int64 [E], rows per expert, the experts in (group, expert) order.
    """

    order: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    groups: list[GroupRows]
    counts: npt.NDArray[np.int64]


class LayerTable:
    """Where each expert of one layer stands in (group, expert) order; made once per layer."""

    def __init__(self, owner: Sequence[int]) -> None:
        """owner: [E], the group index of each expert."""
        self._owner = np.asarray(owner, dtype=np.int64)
        experts_in_order = np.argsort(self._owner, kind="stable")
        kind: type[np.signedinteger[Any]] = np.int16 if len(owner) < 1 << 15 else np.int64
        place = np.empty(len(owner), dtype=kind)
        place[experts_in_order] = np.arange(len(owner))
        self._place = place
        held = np.bincount(owner)
        self._groups = np.flatnonzero(held).tolist()
        self._last = held.cumsum()[self._groups] - 1
        self._runs = [
            slice(end - held[group] + 1, end + 1) for group, end in zip(self._groups, self._last, strict=True)
        ]

    def pack(self, index: Tensor) -> Packed:
        """Sort the rows of `index`, int64 [T, K] on the CPU with values in 0..E-1, by (group, expert).

        Rows of one expert stay in token order. A token may name an expert twice.
        """
        pairs = index.numpy()
        keys = self._place[pairs.reshape(-1)]
        order = keys.argsort(kind="stable")
        counts = np.bincount(keys, minlength=len(self._place))
        groups = []
        start = 0
        for group, run, stop in zip(self._groups, self._runs, counts.cumsum()[self._last].tolist(), strict=True):
            if stop > start:
                groups.append(GroupRows(group, start, stop, counts[run]))
                start = stop
        return Packed(order, order // pairs.shape[1], groups, counts)

    def groups_of(self, index: Tensor) -> npt.NDArray[np.int64]:
        """int64 [T, K], the group of each expert in `index`, which is as for `pack`."""
        return self._owner.take(index.numpy())

    def by_expert(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A copy of counts [E] in the order of `Packed.counts`, in order of expert id."""
        return counts.take(self._place)


class _Memory:
    """A matrix that is kept from one layer to the next: fresh pages for every layer would cost more than the copies."""

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        """allocate: uint8 [size_bytes]; by default plain memory."""
        self._allocate = allocate or plain_bytes
        self._bytes = np.empty(0, dtype=np.uint8)
        self._shape: tuple[int, int, torch.dtype] = (0, 1, torch.float32)
        self.words: Words = self._bytes.reshape(0, 1)
        self.bytes = memoryview(b"")

    def shape(self, rows: int, hidden: int, dtype: torch.dtype) -> None:
        """Make `words` [rows, hidden] of the width of `dtype`, and `bytes` the same memory; what was there is void."""
        if self._shape == (rows, hidden, dtype):
            return
        size = rows * hidden * dtype.itemsize
        if self._bytes.nbytes < size:
            self._bytes = self._allocate(size).numpy()
        self.words = self._bytes[:size].view(word_type(dtype)).reshape(rows, hidden)
        self.bytes = self._bytes[:size].data
        self._shape = (rows, hidden, dtype)


class SortedRows:
    """The rows of a layer in sorted order, gathered for all groups at once when the first of them is asked for."""

    def __init__(self) -> None:
        self._memory = _Memory()
        self._hidden: Tensor | None = None
        self._token: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def start(self, hidden: Tensor, token: npt.NDArray[np.int64]) -> None:
        """Begin a layer: rows are `hidden[token]`; what `run` gave before is void."""
        self._hidden, self._token = hidden, token

    def run(self, start: int, stop: int) -> memoryview:
        """The bytes of rows `start` to `stop`, valid until the next `start`.

        Bytes of a call that was forgotten may still wait to be sent when the next layer writes here. Those rows then
        reach the replica mixed with others, which harms nobody: their header has bytes of its own, so the stream stays
        in step, and the result is dropped.
        """
        if self._hidden is not None:
            rows, hidden = len(self._token), self._hidden.shape[1]
            self._memory.shape(rows, hidden, self._hidden.dtype)
            # Every token is in range; "clip" only keeps numpy from checking that in a buffer of its own.
            as_words(self._hidden).take(self._token, axis=0, out=self._memory.words, mode="clip")
            self._hidden = None  # done with it: it must not outlive its layer
        width = len(self._memory.bytes) // len(self._token)
        return self._memory.bytes[start * width : stop * width]


class Results:
    """Results of all rows, [R, H], filled run by run in sorted order, read in (token, expert) order.

    memory: uint8 [size_bytes] of which `rows` is made; by default plain memory.
    """

    def __init__(self, memory: Callable[[int], Tensor] | None = None) -> None:
        self._sorted = _Memory()
        self._restored = _Memory(memory)
        self._dtype = torch.float32
        self._width = 0

    def start(self, rows: int, hidden: int, dtype: torch.dtype) -> None:
        """Begin a layer; what was there before is void."""
        self._sorted.shape(rows, hidden, dtype)
        self._restored.shape(rows, hidden, dtype)
        self._dtype = dtype
        self._width = hidden * dtype.itemsize

    def run(self, start: int, stop: int) -> memoryview:
        """The bytes of rows `start` to `stop`, for whoever can fill them in place."""
        return self._sorted.bytes[start * self._width : stop * self._width]

    def put(self, start: int, rows: Tensor) -> None:
        """Write `rows` [r, H], which begin at `start`, in the dtype given to the method `start`."""
        self._sorted.words[start : start + rows.shape[0]] = as_words(rows)

    def rows(self, order: npt.NDArray[np.int64]) -> Tensor:
        """[R, H] in order of (token, expert) pairs, where `order` [R] says which pair each sorted row is.

        A view, valid until the next `start`. Every row must have been filled.
        """
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self._sorted.words.take(place, axis=0, out=self._restored.words, mode="clip")
        rows = torch.from_numpy(self._restored.words)
        return rows if rows.dtype == self._dtype else rows.view(self._dtype)


def plain_bytes(size_bytes: int) -> Tensor:
    """uint8 [size_bytes] of the CPU."""
    return torch.empty(size_bytes, dtype=torch.uint8)


def combine(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight the rows [T * K, H] with `weight` [T, K] and sum those of a token in order of K: [T, H] in `dtype`.

    `(rows * weight.reshape(-1, 1)).view(T, K, H).sum(1).to(dtype)`, in place where that keeps the product's dtype:
    `rows` is spent afterwards. The weight keeps its own dtype, so that the product is rounded as transformers does.
    """
    tokens, experts = weight.shape
    column = weight.reshape(-1, 1)
    in_place = torch.promote_types(rows.dtype, weight.dtype) == rows.dtype
    weighted = rows.mul_(column) if in_place else rows * column
    return weighted.view(tokens, experts, rows.shape[1]).sum(1).to(dtype)

"""Rows of one MoE layer, sorted by (group, expert), and the sum of their results: arithmetic on indices, nothing else.

A router's gate gives every token K experts. `LayerTable.pack` turns that into one contiguous run of rows per group,
within it one run per expert, with one sort and one count; `RowBuffer` takes results in any order and puts every row
back where its (token, expert) pair was; `combine` is the sum rule of transformers' `grouped_mm` experts. Knows no
replica, no transport and no clock. The naive loop over rows is its oracle in the tests.

Indices are computed in numpy: a call on a few dozen integers costs 1 us there and 4 to 7 us in torch, and sorting
16-bit keys is a radix sort.
Dimension letters: T tokens, K experts per token, E experts, H hidden, R rows (R == T * K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class GroupRows:
    """The rows of one group: `start` to `stop` in sorted order. counts: int64, rows per expert the group holds."""

    group: int
    start: int
    stop: int
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of one layer in sorted order.

    order: int64 [R], which (token, expert) pair, as token * K + k, stands at each place.
    token: int64 [R], the token of each row.
    groups: the groups that have rows, in order of group index; their runs cover 0 to R.
    """

    order: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    groups: tuple[GroupRows, ...]


class LayerTable:
    """Where each expert of one layer stands in (group, expert) order; made once per layer."""

    def __init__(self, owner: Sequence[int]) -> None:
        """owner: [E], the group index of each expert."""
        experts_in_order = np.argsort(np.asarray(owner, dtype=np.int64), kind="stable")
        place = np.empty(len(owner), dtype=np.int16 if len(owner) < 1 << 15 else np.int64)
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
        return Packed(order, order // pairs.shape[1], tuple(groups))


class RowBuffer:
    """Results of all rows, [R, H] in (token, expert) order, filled run by run.

    The memory is kept from one layer to the next: fresh pages for every layer would cost more than the copy itself.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._words: Words = self._memory.reshape(0, 1)
        self._dtype = torch.float32

    def start(self, rows: int, hidden: int, dtype: torch.dtype) -> None:
        """Begin a layer; what was there before is void."""
        size = rows * hidden * dtype.itemsize
        if self._memory.nbytes < size:
            self._memory = np.empty(size, dtype=np.uint8)
        self._words = self._memory[:size].view(word_type(dtype)).reshape(rows, hidden)
        self._dtype = dtype

    def put(self, order: npt.NDArray[np.int64], rows: Tensor) -> None:
        """Write `rows`, whose places are `order` [R of this run], in the dtype given to `start`."""
        self._words[order] = as_words(rows)

    def rows(self) -> Tensor:
        """[R, H]; a view, valid until the next `start`. Every row must have been put."""
        rows = torch.from_numpy(self._words)
        return rows if rows.dtype == self._dtype else rows.view(self._dtype)


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


def as_words(tensor: Tensor) -> Words:
    """The memory of a CPU tensor as an array; integers of its width for bfloat16, which numpy does not know."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@cache
def word_type(dtype: torch.dtype) -> np.dtype[Any]:
    """What `as_words` makes of `dtype`."""
    return as_words(torch.empty(0, dtype=dtype)).dtype

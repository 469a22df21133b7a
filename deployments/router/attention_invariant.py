"""Attention that computes every query row alone and in one order, whatever else is in the step.

A query row at position i sees keys 0..i wherever it stands: as a decode row, inside a prefill chunk, after a resume.
Keys come in blocks of `BLOCK_KEYS` from position 0 on, and each block updates a running maximum, sum and output
(online softmax, Milakov and Gimelshein, arXiv 1805.02867). A block that is masked as a whole multiplies by exp(0) = 1
and adds 0, so blocks beyond a row's end, or before its window, change no bit and may be skipped or not. Rows go in
tiles of `ROW_TILE`, so that every operator sees one shape; all of it is float32, rounded once at the end. Latent layers
are always absorbed. This costs a gather per row where the fast form (attention.py) shares one per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.router.attention import PagedStep, Scores
from deployments.router.batch_invariant import ROW_TILE
from deployments.router.step import SequenceSlice

BLOCK_KEYS = 128


@dataclass(frozen=True)
class KeyBlock:
    """pages: [ROW_TILE, pages of a block]. bias: [ROW_TILE, 1, 1, keys of a block], 0 or -inf."""

    pages: Tensor
    bias: Tensor


class RowwiseAttention:
    """The rows of one step in tiles; the step is padded to whole tiles, padding rows see one key of the spill page."""

    def __init__(
        self, slices: Sequence[SequenceSlice], page_tokens: int, null_page: int, spill_page: int, device: torch.device
    ) -> None:
        self._page_tokens = page_tokens
        self._block_pages = -(-BLOCK_KEYS // page_tokens)
        self._device = device
        rows = [
            (index, part.context_tokens - part.length + 1 + offset)
            for index, part in enumerate(slices)
            for offset in range(part.length)
        ]
        rows += [(len(slices), 1)] * (-len(rows) % ROW_TILE)
        # No page beyond the context: it holds what its last owner left there, and a mask does not hide NaN.
        written = [part.pages[: -(-part.context_tokens // page_tokens)] for part in slices]
        width = max(map(len, written)) + self._block_pages
        tables = [[*pages, *[null_page] * (width - len(pages))] for pages in written]
        tables.append([spill_page, *[null_page] * (width - 1)])
        self._tables = torch.tensor(tables, device=device)
        self._rows = rows
        self._tiles: dict[int | None, list[list[KeyBlock]]] = {}

    def __call__(self, step: PagedStep, layer: int, query: Tensor, window: int | None, scores: Scores) -> Tensor:
        """query [T, H, D], T a multiple of ROW_TILE -> [T, H, V]."""
        if window not in self._tiles:
            firsts = range(0, len(self._rows), ROW_TILE)
            self._tiles[window] = [self._blocks(self._rows[first : first + ROW_TILE], window) for first in firsts]
        projection = step.projections.get(layer)
        outputs = []
        for index, blocks in enumerate(self._tiles[window]):
            rows = query[index * ROW_TILE : (index + 1) * ROW_TILE].float()
            if projection is None:
                outputs.append(_tile(step, layer, rows, blocks, scores))
            else:
                outputs.append(projection.emit(_tile(step, layer, projection.absorb(rows), blocks, scores)))
        return torch.cat(outputs).to(query.dtype)

    def _blocks(self, rows: Sequence[tuple[int, int]], window: int | None) -> list[KeyBlock]:
        keys = self._block_pages * self._page_tokens
        ends = [end for _, end in rows]
        starts = [0 if window is None else max(0, end - window) for end in ends]
        tables = self._tables[torch.tensor([sequence for sequence, _ in rows], device=self._device)]
        bounds = torch.tensor([starts, ends], device=self._device)[..., None]
        blocks = []
        for block in range(min(starts) // keys, -(-max(ends) // keys)):
            key = torch.arange(block * keys, (block + 1) * keys, device=self._device)
            hidden = (key < bounds[0]) | (key >= bounds[1])
            bias = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, float("-inf"))
            pages = tables[:, block * self._block_pages : (block + 1) * self._block_pages]
            blocks.append(KeyBlock(pages.contiguous(), bias[:, None, None]))
        return blocks


def _tile(step: PagedStep, layer: int, query: Tensor, blocks: Sequence[KeyBlock], scores: Scores) -> Tensor:
    """query [ROW_TILE, H, D] float32 -> [ROW_TILE, H, V] float32."""
    shape = step.cache.shapes[layer]
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    grouped = (query * scale).reshape(ROW_TILE, shape.heads, -1, query.shape[2])
    if scores.sinks is None:
        # A finite floor: -inf - -inf would be NaN in a block that is masked as a whole.
        best = grouped.new_full((*grouped.shape[:3], 1), torch.finfo(torch.float32).min)
        total = torch.zeros_like(best)
    else:
        best = scores.sinks.float().view(1, *grouped.shape[1:3], 1).expand(ROW_TILE, -1, -1, -1)
        total = torch.ones_like(best)
    sums = grouped.new_zeros(())
    for block in blocks:
        keys, values = step.cache.gather(layer, block.pages)
        logits = grouped @ keys.float().permute(0, 2, 3, 1)
        if scores.softcap is not None:
            logits = torch.tanh(logits / scores.softcap) * scores.softcap
        logits = logits + block.bias
        higher = torch.maximum(best, logits.amax(-1, keepdim=True))
        weights, keep = torch.exp(logits - higher), torch.exp(best - higher)
        total = total * keep + weights.sum(-1, keepdim=True)
        sums = sums * keep + weights @ values.float().transpose(1, 2)
        best = higher
    return (sums / total).flatten(1, 2)

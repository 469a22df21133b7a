"""The bounded pool of keys and values: pages of one tensor per layer, allocated once, addressed by slot.

    pool[layer]  [P + 2, page_tokens * heads * width]
    slot s       page s // page_tokens, row s % page_tokens; a row is heads x (key | value)
    page P       the null page: zeros for ever, what a page table is padded with
    page P + 1   the spill page: padding tokens write there

A layer of multi-head latent attention (DeepSeek's MLA) stores its row as the model caches it, compressed: one "head" of
kv_lora_rank + rope values, shared by all heads. DeepSeek-V3 keeps 512 + 64 values per token and layer that way instead
of 128 heads x (192 + 128) = 40,960, a 71st; the price is two small products per token (attention_mla.py).

To the model this is its `past_key_values`, but `update` hands back only the step's new rows: the attention function
reads the rest from here. Knows no sequences; who owns which page is the page pool's business.
Paging follows Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import ConfigError, UnsupportedModelError

# What models with more than keys and values ask of their cache, and what it tells about them.
_FOREIGN_STATE = {
    "update_conv_state": "keeps convolution state (linear attention)",
    "get_conv_state": "keeps convolution state (linear attention)",
    "update_recurrent_state": "keeps recurrent state (linear attention)",
    "get_recurrent_state": "keeps recurrent state (linear attention)",
    "has_previous_state": "keeps recurrent state (linear attention)",
    "update_indexer": "keeps an indexer cache (sparse attention)",
    "layers": "reaches into the layers of its cache",
}


@dataclass(frozen=True)
class RowShape:
    """One layer's row: `heads` key/value heads of `key` and `value` numbers. Latent rows have one head and no value."""

    heads: int
    key: int
    value: int
    latent: bool

    @property
    def numbers(self) -> int:
        """Numbers in one row."""
        return self.heads * (self.key + self.value)


class PagedKVCache:
    """Keys and values of all sequences of one router.

    A layer's tensor is made by `reserve`, or by the first `update` of that layer where nothing was reserved.
    latent_layers: layers whose `update` receives (latent, rotary key) instead of (key, value).
    Call `begin_step` before each forward pass.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        latent_layers: Collection[int] = (),
    ) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ConfigError(f"router.kv_tokens: {num_pages} pages of {page_tokens} tokens hold nothing.")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.shapes: dict[int, RowShape] = {}
        self._slots = torch.zeros(0, dtype=torch.long, device=device)
        self._fresh_pages = self._slots
        self._latent_layers = frozenset(latent_layers)
        self._dtype = dtype
        self._device = device
        self._pools: dict[int, Tensor] = {}

    @property
    def null_page(self) -> int:
        """A page of zeros."""
        return self.num_pages

    @property
    def spill_page(self) -> int:
        """The page padding tokens write to."""
        return self.num_pages + 1

    @property
    def pool_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(pool.numel() * pool.element_size() for pool in self._pools.values())

    def reserve(self, shapes: dict[int, RowShape]) -> None:
        """Allocate every layer now, so that the pool's size is known and final."""
        for layer, shape in shapes.items():
            self._allocate(layer, shape)

    def begin_step(self, slots: Tensor, fresh_pages: Tensor) -> None:
        """Where the step's T rows go, and which pages it writes from their first row on: those are zeroed.

        Slots past a sequence's end are masked by a weight of 0, and 0 x inf is NaN: without the zeroing, a sequence
        that overflowed would spoil the next owner of its pages.
        """
        self._slots, self._fresh_pages = slots, fresh_pages

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the step's rows, [1, heads, T, width] each, to their slots; returns the arguments: only new rows."""
        if layer_idx not in self._pools:
            heads, key, value = first.shape[1], first.shape[3], second.shape[3]
            latent = layer_idx in self._latent_layers
            self._allocate(layer_idx, RowShape(heads, key + value if latent else key, 0 if latent else value, latent))
        pool = self._pools[layer_idx]
        if self._fresh_pages.numel():
            pool.index_fill_(0, self._fresh_pages, 0)
        rows = torch.cat((first, second), dim=-1)
        heads, tokens, width = rows.shape[1:]
        rows = rows.view(tokens, width) if heads == 1 else rows[0].transpose(0, 1).flatten(1)
        pool.view(-1, heads * width).index_copy_(0, self._slots, rows)
        return first, second

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of page tables [B, P]: [B, P * page_tokens, heads, width] each; latent rows are both."""
        shape = self.shapes[layer]
        rows = F.embedding(pages, self._pools[layer])
        rows = rows.view(pages.shape[0], -1, shape.heads, shape.key + shape.value)
        if shape.latent:
            return rows, rows
        return rows[..., : shape.key], rows[..., shape.key :]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Transformers asks for the past length to count positions; steps bring theirs."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """As `get_seq_length`, for masks, which are replaced as well."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """(keys, offset) for a mask nobody reads."""
        return query_length, 0

    def _allocate(self, layer: int, shape: RowShape) -> None:
        size = (self.num_pages + 2, self.page_tokens * shape.numbers)
        self._pools[layer] = torch.zeros(size, dtype=self._dtype, device=self._device)
        self.shapes[layer] = shape

    def __getattr__(self, name: str) -> NoReturn:
        if name in _FOREIGN_STATE:
            raise UnsupportedModelError(f"The model {_FOREIGN_STATE[name]}, which the paged pool cannot hold.")
        raise AttributeError(name)

"""Attention over the paged pool for a packed step: one function that every layer of the model calls.

Letters: T tokens of the step, B decode rows, Q queries of a chunk, L keys, H heads, G key/value heads, D head width.

    1. The layer writes its new keys and values to the pool (`PagedKVCache.update`) and calls `paged_attention`.
    2. Decode rows gather their pages [B, P] and attend together, bucket by bucket (step_layout.py).
    3. Each prefill chunk gathers its own pages and attends with a causal mask shifted by what came before it.

Grouped heads are a broadcast dimension, never repeated in memory. A latent layer is the same with G = 1 and the row
as key and value (attention_mla.py). An attention sink is a key of zeros (the null page) whose mask entry is the sink.
Sliding windows come from the mask the model itself asks for: `describe_mask` stands in for transformers' mask
builders and returns the window instead of a matrix. Knows no weights and no sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UnsupportedModelError
from deployments.router.attention_mla import LatentProjection
from deployments.router.kv_cache import PagedKVCache
from deployments.router.step_layout import StepLayout

IMPLEMENTATION = "expertscale_paged"


@dataclass(frozen=True)
class CausalMask:
    """What a layer may see: everything up to itself, or the last `window` tokens of that."""

    window: int | None

    def __getitem__(self, index: object) -> NoReturn:
        """Models that choose keys by themselves cut pieces out of their mask."""
        raise UnsupportedModelError("The model edits its attention mask (sparse attention, by an indexer for example).")


@dataclass(frozen=True)
class Scores:
    """How scores become weights. sinks: [H] logits of a key that takes weight and gives nothing. softcap: tanh."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True)
class PagedStep:
    """Everything a layer needs to attend; travels through the model as the keyword argument `paged`.

    rowwise: the batch-invariant form that replaces the fast one (attention_invariant.py), where asked for.
    """

    cache: PagedKVCache
    layout: StepLayout
    projections: Mapping[int, LatentProjection]
    rowwise: Callable[[PagedStep, int, Tensor, int | None, Scores], Tensor] | None = None


def register() -> None:
    """Make transformers know `IMPLEMENTATION`; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, describe_mask)


def describe_mask(
    *, mask_function: Callable[..., Tensor], local_size: int | None = None, use_vmap: bool = False, **_: object
) -> CausalMask | None:
    """The mask a model asks for, as a description; None for anything but causal or a causal sliding window.

    Models ask for masks that no layer of theirs uses, so it is `paged_attention` that refuses the unknown ones.
    """
    # A plain function is the same one at every step; a closure is a new one each time, and may hold tensors.
    known = _known_for_good if getattr(mask_function, "__closure__", ()) is None else _known
    return CausalMask(local_size) if not use_vmap and known(mask_function, local_size) else None


def _known(mask_function: Callable[..., Tensor], local_size: int | None) -> bool:
    """Whether the function allows exactly what a `CausalMask` says."""
    far = 1 << 20 if local_size is None else local_size
    query, key = torch.tensor([far, far, far - 1, far - 1]), torch.tensor([0, 1, 0, far])
    zero = torch.zeros(4, dtype=torch.long)
    seen = mask_function(zero, zero, query, key).tolist()
    return bool(seen == [local_size is None, True, True, False])


_known_for_good = lru_cache(_known)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,  # noqa: ARG001
    attention_mask: CausalMask | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    paged: PagedStep | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [1, H, T, D] -> [1, T, H, V]. `key` and `value` are in the pool already.

    Raises:
        UnsupportedModelError: the model calls this in a way whose result would be wrong.
    """
    if paged is None:
        raise UnsupportedModelError("The model does not hand keyword arguments down to its attention.")
    if not isinstance(attention_mask, CausalMask):
        raise UnsupportedModelError("The model masks attention in another way than causal or by a sliding window.")
    if position_bias is not None:
        raise UnsupportedModelError("The model adds a position bias to its attention scores.")
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise UnsupportedModelError("The model's attention modules carry no layer index.")
    scores = Scores(scaling, softcap, s_aux)
    attend = paged.rowwise or _attend
    return attend(paged, layer, query[0].transpose(0, 1), attention_mask.window, scores)[None], None


def _attend(step: PagedStep, layer: int, query: Tensor, window: int | None, scores: Scores) -> Tensor:
    """query [T, H, D] -> [T, H, V]."""
    decoded = step.layout.decode_rows
    if decoded == query.shape[0]:
        return _decode(step, layer, query, window, scores)
    projection = step.projections.get(layer)
    sink, page_tokens = scores.sinks is not None, step.layout.page_tokens
    parts = []
    if decoded:
        parts.append(_decode(step, layer, query[:decoded], window, scores))
    for chunk in step.layout.prefill(window, sink):
        rows = query[chunk.start : chunk.start + chunk.length]
        keys, values = step.cache.gather(layer, chunk.pages)
        if chunk.bias is None:
            keys, values = keys[:, : chunk.keys], values[:, : chunk.keys]
        if projection is None:
            parts.append(_prefill(rows, keys, values, chunk.bias, scores, page_tokens))
        elif projection.absorbing_is_cheaper(chunk.length, keys.shape[1]):
            latent = _prefill(projection.absorb(rows), keys, values, chunk.bias, scores, page_tokens)
            parts.append(projection.emit(latent))
        else:
            parts.append(_prefill(rows, *projection.expand(keys), chunk.bias, scores, page_tokens))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(step: PagedStep, layer: int, query: Tensor, window: int | None, scores: Scores) -> Tensor:
    """query [B, H, D] -> [B, H, V], every row over its own pages."""
    projection = step.projections.get(layer)
    if projection is not None:
        query = projection.absorb(query)
    buckets = step.layout.decode(window, scores.sinks is not None)
    outputs = []
    for bucket in buckets:
        rows = query if bucket.rows is None else query.index_select(0, bucket.rows)
        keys, values = step.cache.gather(layer, bucket.pages)
        grouped = rows.reshape(rows.shape[0], keys.shape[2], -1, rows.shape[2])
        bias = bucket.bias
        if scores.sinks is not None:
            sinks = scores.sinks.view(grouped.shape[1:3])
            bias = _with_sinks(bias.expand(-1, *sinks.shape, -1), sinks, step.layout.page_tokens)
        outputs.append(_weigh(grouped, keys.transpose(1, 2), values.transpose(1, 2), bias, scores).flatten(1, 2))
    attended = outputs[0]
    if len(buckets) > 1:
        order = torch.cat([bucket.rows for bucket in buckets if bucket.rows is not None])
        packed = torch.cat(outputs)
        attended = torch.empty_like(packed).index_copy_(0, order, packed)
    return attended if projection is None else projection.emit(attended)


def _prefill(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scores: Scores, page_tokens: int
) -> Tensor:
    """query [Q, H, D], keys [1, L, G, D], values [1, L, G, V], bias [Q, L] or None for causal -> [Q, H, V].

    The G groups become the batch; the H / G heads of a group share keys through a stride of 0.
    """
    groups, width = keys.shape[2], values.shape[3]
    grouped = query.reshape(query.shape[0], groups, -1, query.shape[2]).permute(1, 2, 0, 3)
    shared = (groups, grouped.shape[1], -1, -1)
    keys, values = (part[0].transpose(0, 1)[:, None].expand(shared) for part in (keys, values))
    if width < keys.shape[3]:
        # The fused kernel wants one width; without it the scores [H, Q, L] would be held in memory.
        values = F.pad(values, (0, keys.shape[3] - width))
    if bias is not None:
        bias = bias[None, None]
        if scores.sinks is not None:
            sinks = scores.sinks.view(*grouped.shape[:2], 1)
            bias = _with_sinks(bias.expand(*grouped.shape[:2], -1, -1), sinks, page_tokens)
    out = _weigh(grouped, keys, values, bias, scores)[..., :width]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _with_sinks(bias: Tensor, sinks: Tensor, page_tokens: int) -> Tensor:
    """`bias` [..., L] with `sinks` [...] in the first slot of the null page at its end."""
    filled = bias.clone()
    filled[..., -page_tokens] = sinks.to(bias.dtype)
    return filled


def _weigh(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scores: Scores) -> Tensor:
    """softmax(query keys^T * scale + bias) values over [..., Q, D], [..., L, D], [..., L, V]; bias None is causal."""
    if scores.softcap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, is_causal=bias is None, scale=scores.scale
        )
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    logits = torch.tanh(query @ keys.mT * (scale / scores.softcap)) * scores.softcap
    if bias is None:
        bias = torch.full(logits.shape[-2:], float("-inf"), dtype=logits.dtype, device=logits.device).triu(1)
    return (logits + bias).softmax(-1, dtype=torch.float32).to(values.dtype) @ values

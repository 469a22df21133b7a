"""The model without its experts: one forward pass of a packed step over the paged pool.

Wraps any transformers causal language model. Sequences are packed along the token axis of a batch of one, with explicit
positions; attention and cache are ours (attention.py, kv_cache.py), everything else is the model's own code, down to
the scaling of its logits. Knows no requests and no sampling; what a MoE layer does is the `moe` function's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cluster.checkpoint import load_router_model, parameter_bytes
from cluster.errors import ConfigError, ExpertScaleError, UnsupportedModelError
from cluster.load_plan import LoadPlan
from cluster.threads import require_one_thread
from deployments.router import attention, probe
from deployments.router.attention_invariant import RowwiseAttention
from deployments.router.attention_mla import LatentProjection, bind_latent_layers
from deployments.router.batch_invariant import ROW_TILE, fix_rows
from deployments.router.kv_cache import PagedKVCache
from deployments.router.shared_expert import SharedExpert, bind_shared_experts
from deployments.router.shortcuts import shorten
from deployments.router.step import StepInput
from deployments.router.step_layout import StepLayout
from deployments.router.substitutes import substitute

MoeFunction = Callable[..., Tensor]
"""(layer, hidden [T, H], expert index [T, K], weight [T, K]) -> combined output [T, H]; where it has a parameter
`meanwhile`, as `Dispatcher.scatter_gather`, it calls that once while rows are away."""


class MoeSwitch:
    """The `moe` function as the model calls it: silent during the start-up check, and without padding rows.

    rows: how many of the T rows are real in the step that runs; the others get zeros and travel nowhere.
    shared: the shared experts by layer, which run while the rows are away where `moe` takes a `meanwhile`.
    """

    def __init__(self, moe: MoeFunction) -> None:
        self._moe = moe
        self._overlaps = "meanwhile" in signature(moe).parameters
        self.silent = False
        self.rows: int | None = None
        self.shared: Mapping[int, SharedExpert] = {}

    def __call__(self, layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """hidden [T, H], index and weight [T, K] -> [T, H]."""
        meanwhile = None
        if self._overlaps and layer in self.shared:
            meanwhile = self.shared[layer].announce(hidden)
        if self.silent:
            if meanwhile is not None:
                meanwhile()
            return torch.zeros_like(hidden)
        moe = self._moe if meanwhile is None else partial(self._moe, meanwhile=meanwhile)
        if self.rows is None or self.rows == hidden.shape[0]:
            return moe(layer, hidden, index, weight)
        out = torch.zeros_like(hidden)
        out[: self.rows] = moe(layer, hidden[: self.rows], index[: self.rows], weight[: self.rows])
        return out


class Backbone:
    """A loaded model ready for `forward`. Fulfils `BackboneLike`.

    model: in evaluation mode; it is changed for good (attention implementation, weights where batch invariant).
    kv_tokens: keys and values the pool holds, a whole number of pages of `page_tokens`.
    max_context: by default the model's own limit. moe: the switch the model was loaded with, where it has one.

    Raises:
        ConfigError: kv_tokens is below one page, or batch invariance does not hold here.
        UnsupportedModelError: the model cannot run packed over a paged cache; says why.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv_tokens: int,
        page_tokens: int = 16,
        batch_invariant: bool = False,
        max_context: int | None = None,
        moe: MoeSwitch | None = None,
    ) -> None:
        if kv_tokens < page_tokens:
            raise ConfigError(f"router.kv_tokens: {kv_tokens} is below one page of {page_tokens} tokens.")
        text = model.config.get_text_config()
        if batch_invariant:
            require_one_thread(model.get_input_embeddings().weight.device)
        self._model = model
        self._moe = moe
        self._batch_invariant = batch_invariant
        self._device = model.get_input_embeddings().weight.device
        self._dtype = cast(torch.dtype, model.get_input_embeddings().weight.dtype)
        self._vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._max_context = int(max_context or text.max_position_embeddings)
        self._eos = _eos_token_ids(model)
        self._projections: dict[int, LatentProjection] = {}
        shapes = self._prepare()
        self._cache = self._new_cache(kv_tokens // page_tokens, page_tokens)
        self._cache.reserve(shapes)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, V."""
        return self._vocab_size

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence the model takes."""
        return self._max_context

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return self._eos

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self._cache.page_tokens

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._cache.num_pages

    @property
    def kv_pool_bytes(self) -> int:
        """Bytes of keys and values, allocated once at start-up."""
        return self._cache.pool_bytes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the model's weights; none of them an expert's."""
        return parameter_bytes(self._model)

    def forward(self, step: StepInput) -> Tensor:
        """Write the step's keys and values, return the float32 logits [S, V] of `step.logits_rows`."""
        return self._forward(step, self._cache)

    @torch.inference_mode()
    def _forward(self, step: StepInput, cache: PagedKVCache) -> Tensor:
        count = len(step.tokens)
        padding = -count % ROW_TILE if self._batch_invariant else 0
        wanted = list(step.logits_rows)
        if self._batch_invariant:
            wanted += [0] * (-len(wanted) % ROW_TILE)
        paged = self._paged_step(step, cache, padding)
        if self._moe is not None:
            self._moe.rows = count
        output = self._model(
            input_ids=self._tensor([*step.tokens, *[0] * padding])[None],
            position_ids=self._tensor([*step.positions, *[0] * padding])[None],
            past_key_values=cache,
            use_cache=True,
            # 0 is all of them, as when every sequence decodes.
            logits_to_keep=0 if wanted == list(range(count + padding)) else self._tensor(wanted),
            paged=paged,
        )
        return cast(Tensor, output.logits)[0, : len(step.logits_rows)].float()

    def _paged_step(self, step: StepInput, cache: PagedKVCache, padding: int) -> attention.PagedStep:
        size, slices = cache.page_tokens, step.slices
        layout = StepLayout(slices, step.decode_slices, size, cache.null_page, dtype=self._dtype, device=self._device)
        spill = layout.slots.new_full((padding,), cache.spill_page * size)
        cache.begin_step(torch.cat((layout.slots, spill)) if padding else layout.slots, layout.fresh_pages)
        rowwise = None
        if self._batch_invariant:
            rowwise = RowwiseAttention(slices, size, cache.null_page, cache.spill_page, self._device)
        return attention.PagedStep(cache, layout, self._projections, rowwise)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)

    def _new_cache(self, num_pages: int, page_tokens: int) -> PagedKVCache:
        return PagedKVCache(
            num_pages, page_tokens, dtype=self._dtype, device=self._device, latent_layers=self._projections
        )

    def _prepare(self) -> Any:
        """Switch the model to our attention and check that it still computes the same. Returns the row shapes."""
        if self._moe is not None:
            self._moe.silent = True
        try:
            whole = self._uncached_logits()
            self._rewire()
            cache = self._new_cache(probe.NUM_PAGES, probe.PAGE_TOKENS)
            forward = partial(self._forward, cache=cache)
            packed = probe.check_agreement(whole, forward, self._vocab_size, self._dtype)
            if self._batch_invariant:
                probe.check_invariance(packed, forward, self._vocab_size)
        except ExpertScaleError:
            raise
        except Exception as error:
            # Whatever an unknown model trips over here it would trip over in its first step.
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedModelError(f"The model cannot run packed over a paged cache: {reason}") from error
        finally:
            if self._moe is not None:
                self._moe.silent = False
        return cache.shapes

    @torch.inference_mode()
    def _uncached_logits(self) -> list[Tensor]:
        self._model.set_attn_implementation("eager")
        batches = [self._tensor(tokens)[None] for tokens in probe.probe_tokens(self._vocab_size)]
        return [self._model(input_ids=tokens, use_cache=False).logits[0] for tokens in batches]

    def _rewire(self) -> None:
        attention.register()
        if self._moe is not None:
            self._moe.shared = bind_shared_experts(self._model)
        self._projections = bind_latent_layers(self._model)
        self._model.set_attn_implementation(attention.IMPLEMENTATION)
        if self._batch_invariant:
            self._projections = {layer: each.to_float() for layer, each in self._projections.items()}
            modules = self._model.named_modules()
            experts = tuple(f"{name}." for name, module in modules if hasattr(module, "_is_expert_parallel"))
            fix_rows(self._model, lambda name: name.startswith(experts))
        substitute(self._model)
        shorten(self._model)


def load_backbone(
    path: Path,
    plan: LoadPlan,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    moe: MoeFunction,
    kv_tokens: int,
    page_tokens: int = 16,
    batch_invariant: bool = False,
) -> Backbone:
    """Load the router's model from the checkpoint folder `path` and make a backbone of it.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: as `load_router_model` and `Backbone`.
    """
    switch = MoeSwitch(moe)
    model = load_router_model(path, plan, dtype=dtype, device=device, moe=switch)
    return Backbone(
        model,
        kv_tokens=kv_tokens,
        page_tokens=page_tokens,
        batch_invariant=batch_invariant,
        max_context=plan.max_context,
        moe=switch,
    )


def _eos_token_ids(model: Any) -> frozenset[int]:
    """What ends a sequence: the generation settings come before the model's configuration, as in `generate`."""
    for source in (model.generation_config, model.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()

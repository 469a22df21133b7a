"""Packed, paged attention against the definition, row by row: fast and batch-invariant form. About 5 s."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.errors import UnsupportedModelError
from deployments.router.attention import CausalMask, PagedStep, describe_mask, paged_attention
from deployments.router.attention_invariant import RowwiseAttention
from deployments.router.attention_mla import LatentProjection, bind_latent_layers
from deployments.router.batch_invariant import ROW_TILE
from deployments.router.kv_cache import PagedKVCache
from deployments.router.step import SequenceSlice
from deployments.router.step_layout import SMALL_KEYS, StepLayout

CPU = torch.device("cpu")
PAGE = 4
NONE = torch.zeros(0, dtype=torch.long)


class Layer(nn.Module):
    layer_idx = 0


@dataclass
class Case:
    """Sequences whose (context, new tokens) are given, their keys and values, and the step that holds the new ones."""

    keys: list[Tensor]
    values: list[Tensor]
    query: Tensor
    slices: list[SequenceSlice]
    cache: PagedKVCache

    @property
    def decode_rows(self) -> int:
        return next((i for i, part in enumerate(self.slices) if part.length != 1), len(self.slices))


def make_case(parts: list[tuple[int, int]], heads: int, groups: int, *, latent: int = 0, seed: int = 0) -> Case:
    """latent: width of the compressed part, which makes keys [L, 1, latent + 4] and no values."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = random.Random(seed)
    parts = sorted(parts, key=lambda part: part[1] != 1)
    total = sum(-(-context // PAGE) for context, _ in parts)
    free = shuffled.sample(range(total), total)
    cache = PagedKVCache(total, PAGE, dtype=torch.float32, device=CPU, latent_layers=(0,) if latent else ())
    keys, values, slices, start = [], [], [], 0
    for context, new in parts:
        keys.append(torch.randn(context, groups, latent or 8, generator=generator))
        values.append(torch.randn(context, groups, 4 if latent else 8, generator=generator))
        pages = [free.pop() for _ in range(-(-context // PAGE))]
        slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(context)])
        cache.begin_step(slots, NONE)
        cache.update(keys[-1].transpose(0, 1)[None], values[-1].transpose(0, 1)[None], 0)
        slices.append(SequenceSlice(start, new, context, pages))
        start += new
    return Case(keys, values, torch.randn(start, heads, 8, generator=generator), slices, cache)


def run(
    case: Case,
    *,
    rowwise: bool,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    projections: dict[int, LatentProjection] | None = None,
) -> Tensor:
    cache = case.cache
    layout = StepLayout(case.slices, case.decode_rows, PAGE, cache.null_page, dtype=torch.float32, device=CPU)
    invariant = RowwiseAttention(case.slices, PAGE, cache.null_page, cache.spill_page, CPU) if rowwise else None
    step = PagedStep(cache, layout, projections or {}, invariant)
    query = case.query
    if rowwise:
        query = torch.cat((query, query.new_zeros(-len(query) % ROW_TILE, *query.shape[1:])))
    query = query.transpose(0, 1)[None]
    out, weights = paged_attention(
        Layer(), query, query, query, CausalMask(window), scaling=0.3, softcap=softcap, s_aux=sinks, paged=step
    )
    assert weights is None
    return out[0, : len(case.query)]


def oracle(case: Case, window: int | None, sinks: Tensor | None, softcap: float | None) -> Tensor:
    """The definition, one query row and one head at a time, in double precision."""
    rows = []
    for part, keys, values in zip(case.slices, case.keys, case.values, strict=True):
        repeat = case.query.shape[1] // keys.shape[1]
        for offset in range(part.length):
            end = part.context_tokens - part.length + offset + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            k, v = (each[seen].double().repeat_interleave(repeat, dim=1) for each in (keys, values))
            scores = torch.einsum("hd,lhd->hl", case.query[part.start + offset].double(), k) * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
            weights = scores.softmax(-1)[:, : k.shape[0]]
            rows.append(torch.einsum("hl,lhd->hd", weights, v))
    return torch.stack(rows).float()


contexts = st.integers(1, 40).flatmap(
    lambda context: st.tuples(st.just(context), st.one_of(st.just(1), st.integers(1, context)))
)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(contexts, min_size=1, max_size=7),
    groups=st.sampled_from([1, 2, 4]),
    window=st.one_of(st.none(), st.integers(1, 20)),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 1.5]),
    rowwise=st.booleans(),
)
def test_any_packed_step_attends_as_defined(
    parts: list[tuple[int, int]],
    groups: int,
    window: int | None,
    sinks: bool,
    softcap: float | None,
    rowwise: bool,
) -> None:
    case = make_case(parts, 4, groups)
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None
    found = run(case, rowwise=rowwise, window=window, sinks=logits, softcap=softcap)
    torch.testing.assert_close(found, oracle(case, window, logits, softcap), atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(contexts, min_size=1, max_size=5), rank=st.sampled_from([4, 24]), rowwise=st.booleans())
def test_latent_attention_equals_attention_over_the_expanded_keys(
    parts: list[tuple[int, int]], rank: int, rowwise: bool
) -> None:
    heads, nope, rope, value = 3, 4, 4, 6
    case = make_case(parts, heads, 1, latent=rank)
    weight = torch.randn(heads * (nope + value), rank, generator=torch.Generator().manual_seed(1))
    split = weight.view(heads, nope + value, rank)
    projection = LatentProjection(weight, split[:, :nope], split[:, nope:].transpose(1, 2), rope)
    expanded = []
    for latent, rotary in zip(case.keys, case.values, strict=True):
        both = torch.einsum("hor,lr->lho", split, latent[:, 0])
        expanded.append((torch.cat((both[..., :nope], rotary.expand(-1, heads, -1)), -1), both[..., nope:]))
    plain = Case([k for k, _ in expanded], [v for _, v in expanded], case.query, case.slices, case.cache)
    found = run(case, rowwise=rowwise, projections={0: projection})
    torch.testing.assert_close(found, oracle(plain, None, None, None), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rowwise", [False, True])
def test_pages_taken_but_not_yet_written_are_never_read(rowwise: bool) -> None:
    """A prompt holds all its pages from its first chunk on; the later ones may hold what an overflow left there."""
    case = make_case([(6, 6), (8, 8)], 4, 2)
    first, second = case.slices
    slots = torch.tensor([page * PAGE + row for page in second.pages for row in range(PAGE)])
    case.cache.begin_step(slots, NONE)
    broken = torch.full((1, 2, 8, 8), torch.nan)
    case.cache.update(broken, broken, 0)
    alone = Case(
        case.keys[:1],
        case.values[:1],
        case.query[:6],
        [replace(first, pages=[*first.pages, *second.pages])],
        case.cache,
    )
    found = run(alone, rowwise=rowwise)
    torch.testing.assert_close(found, oracle(alone, None, None, None), atol=2e-6, rtol=1e-5)


def test_long_chunks_expand_the_latents_and_decode_rows_absorb_them() -> None:
    deepseek_v3 = LatentProjection(
        torch.empty(0), torch.empty(128, 128, 512, device="meta"), torch.empty(128, 512, 128, device="meta"), rope=64
    )
    assert deepseek_v3.absorbing_is_cheaper(1, 4096)
    assert deepseek_v3.absorbing_is_cheaper(163, 4096)
    assert not deepseek_v3.absorbing_is_cheaper(164, 4096)
    assert not deepseek_v3.absorbing_is_cheaper(512, 4096)
    assert not deepseek_v3.absorbing_is_cheaper(512, 512)


def test_decode_rows_of_very_different_length_are_not_padded_to_the_longest() -> None:
    parts = [SequenceSlice(i, 1, n, range(n)) for i, n in enumerate([900, 8, 500, 70, 260, 90, 400, 700, 210])]
    layout = StepLayout(parts, len(parts), 1, 1000, dtype=torch.float32, device=CPU)
    buckets = layout.decode(None, False)
    rows = [bucket.rows.tolist() for bucket in buckets if bucket.rows is not None]
    assert sorted(row for bucket in rows for row in bucket) == list(range(9))
    assert len(buckets) == 3
    for bucket in buckets:
        kept = (bucket.bias == 0).sum(-1).flatten()
        assert (bucket.pages.shape[1] <= (2 * kept).clamp_min(SMALL_KEYS)).all()


def test_rows_of_like_length_attend_in_one_call() -> None:
    parts = [SequenceSlice(i, 1, n, range(100)) for i, n in enumerate([60, 100, 80])]
    [bucket] = StepLayout(parts, 3, 1, 1000, dtype=torch.float32, device=CPU).decode(None, False)
    assert bucket.rows is None


def test_a_sliding_window_reads_no_page_before_it() -> None:
    parts = [SequenceSlice(0, 1, 400, range(100))]
    [bucket] = StepLayout(parts, 1, PAGE, 1000, dtype=torch.float32, device=CPU).decode(8, False)
    assert bucket.pages.tolist() == [[98, 99]]


def test_a_mask_is_described_by_its_window() -> None:
    def windowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return (key <= query) & (key > query - 7)

    def chunked(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return (key <= query) & (key // 7 == query // 7)

    assert describe_mask(mask_function=lambda b, h, q, k: k <= q) == CausalMask(None)  # noqa: ARG005
    assert describe_mask(mask_function=windowed, local_size=7) == CausalMask(7)
    assert describe_mask(mask_function=chunked, local_size=7) is None
    assert describe_mask(mask_function=lambda b, h, q, k: q >= 0) is None  # noqa: ARG005


def test_calls_that_would_give_a_wrong_result_are_refused() -> None:
    case = make_case([(3, 3)], 4, 2)
    query = case.query.transpose(0, 1)[None]
    with pytest.raises(UnsupportedModelError, match="keyword arguments"):
        paged_attention(Layer(), query, query, query, CausalMask(None))
    layout = StepLayout(case.slices, 0, PAGE, case.cache.null_page, dtype=torch.float32, device=CPU)
    step = PagedStep(case.cache, layout, {})
    with pytest.raises(UnsupportedModelError, match="masks attention"):
        paged_attention(Layer(), query, query, query, None, paged=step)
    with pytest.raises(UnsupportedModelError, match="position bias"):
        paged_attention(Layer(), query, query, query, CausalMask(None), position_bias=query, paged=step)


def test_a_projection_with_a_bias_cannot_be_absorbed() -> None:
    class Latent(nn.Module):
        layer_idx = 0

        def __init__(self) -> None:
            super().__init__()
            self.kv_b_proj = nn.Linear(2, 4)

        def expand_kv(self) -> None: ...

    with pytest.raises(UnsupportedModelError, match="kv_b_proj"):
        bind_latent_layers(nn.Sequential(Latent()))

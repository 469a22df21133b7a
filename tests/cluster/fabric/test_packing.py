"""Packing, putting back and combining against the naive loop over rows (about 3 s)."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.fabric.packing import LayerTable, Results, SortedRows, combine


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], Tensor]:
    """(owner of each expert, index [T, K]): groups without experts, groups without rows, experts named twice."""
    owner = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    tokens, per_token = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    expert = st.integers(0, len(owner) - 1)
    pairs = draw(st.lists(expert, min_size=tokens * per_token, max_size=tokens * per_token))
    return owner, torch.tensor(pairs, dtype=torch.int64).reshape(tokens, per_token)


def naive_runs(owner: list[int], index: Tensor) -> dict[int, list[tuple[int, int]]]:
    """Group -> its (expert, pair) rows, sorted by expert, pairs in order: one Python step per row."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for pair, expert in enumerate(index.flatten().tolist()):
        runs.setdefault(owner[expert], []).append((expert, pair))
    return {group: sorted(rows) for group, rows in runs.items()}


@settings(max_examples=300, deadline=None)
@given(layers())
def test_rows_are_grouped_and_counted_as_by_the_naive_loop(layer: tuple[list[int], Tensor]) -> None:
    owner, index = layer
    packed = LayerTable(owner).pack(index)
    expected = naive_runs(owner, index)
    assert [rows.group for rows in packed.groups] == sorted(expected)
    end = 0
    for rows in packed.groups:
        assert rows.start == end
        end = rows.stop
        run = expected[rows.group]
        assert packed.order[rows.start : rows.stop].tolist() == [pair for _, pair in run]
        assert packed.token[rows.start : rows.stop].tolist() == [pair // index.shape[1] for _, pair in run]
        held = [expert for expert, group in enumerate(owner) if group == rows.group]
        assert rows.counts.tolist() == [sum(expert == e for e, _ in run) for expert in held]
    assert end == index.numel()
    asked = index.flatten().tolist()
    assert LayerTable(owner).by_expert(packed.counts).tolist() == [asked.count(e) for e in range(len(owner))]


@settings(max_examples=100, deadline=None)
@given(layers())
def test_the_group_of_each_row_is_that_of_its_expert(layer: tuple[list[int], Tensor]) -> None:
    owner, index = layer
    assert LayerTable(owner).groups_of(index).tolist() == [[owner[expert] for expert in row] for row in index.tolist()]


def naive_moe(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Expert e multiplies by e + 1; the rows of a token are weighted, stacked and summed in order of K."""
    outputs = []
    for token, row in enumerate(hidden):
        weighted = [(row * (int(expert) + 1)) * weight[token, k : k + 1] for k, expert in enumerate(index[token])]
        outputs.append(torch.stack(weighted).sum(0).to(hidden.dtype))
    return torch.stack(outputs) if outputs else torch.empty_like(hidden)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=60, deadline=None)
@given(layer=layers(), seed=st.integers(0, 1 << 16))
def test_results_in_any_order_combine_to_what_the_naive_loop_gives_bit_for_bit(
    dtype: torch.dtype, weight_dtype: torch.dtype, layer: tuple[list[int], Tensor], seed: int
) -> None:
    owner, index = layer
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(index.shape[0], 6, generator=generator).to(dtype)
    weight = torch.rand(index.shape, generator=generator).to(weight_dtype)
    packed = LayerTable(owner).pack(index)
    sorted_rows, results = SortedRows(), Results()
    sorted_rows.start(hidden, packed.token)
    results.start(index.numel(), 6, dtype)
    for rows in reversed(packed.groups):
        held = torch.tensor([expert for expert, group in enumerate(owner) if group == rows.group])
        factor = (held + 1).repeat_interleave(torch.from_numpy(rows.counts)).reshape(-1, 1)
        sent = torch.frombuffer(sorted_rows.run(rows.start, rows.stop), dtype=dtype).view(-1, 6)
        assert torch.equal(sent, hidden[torch.from_numpy(packed.token[rows.start : rows.stop])])
        results.put(rows.start, sent * factor)
    output = combine(results.rows(packed.order), weight, dtype)
    assert output.dtype == dtype
    assert torch.equal(output, naive_moe(hidden, index, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_combine_is_the_sum_rule_of_grouped_mm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    rows = torch.randn(7 * 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.rand(7, 3, generator=torch.Generator().manual_seed(2)).to(weight_dtype)
    expected = (rows * weight.reshape(-1, 1)).view(7, 3, 16).sum(1).to(dtype)
    assert torch.equal(combine(rows.clone(), weight, dtype), expected)


def test_the_buffer_is_used_again_by_the_next_layer_whatever_its_size_and_dtype() -> None:
    results = Results()
    for size, dtype in ((4, torch.float32), (2, torch.bfloat16), (9, torch.float16), (0, torch.float32)):
        rows = torch.randn(size, 3).to(dtype)
        order = np.random.default_rng(size).permutation(size)
        results.start(size, 3, dtype)
        results.put(0, rows[torch.from_numpy(order)])
        assert torch.equal(results.rows(order), rows)


def test_results_may_be_filled_in_place() -> None:
    results = Results()
    results.start(3, 2, torch.float32)
    results.run(1, 3)[:] = torch.tensor([[3.0, 4.0], [5.0, 6.0]]).numpy().tobytes()
    results.put(0, torch.tensor([[1.0, 2.0]]))
    assert results.rows(np.array([2, 0, 1])).tolist() == [[3.0, 4.0], [5.0, 6.0], [1.0, 2.0]]


def test_a_result_written_outside_inference_mode_can_be_combined_inside_and_the_other_way_round() -> None:
    results = Results()
    with torch.inference_mode():
        results.start(2, 3, torch.float32)
    results.put(0, torch.ones(2, 3))
    order = np.arange(2)
    with torch.inference_mode():
        combine(results.rows(order), torch.ones(1, 2), torch.float32)
    assert combine(results.rows(order), torch.ones(1, 2), torch.float32).tolist() == [[2.0, 2.0, 2.0]]


def test_more_experts_than_a_short_integer_counts() -> None:
    owner = [expert % 2 for expert in range(40_000)]
    packed = LayerTable(owner).pack(torch.tensor([[39_999, 0]]))
    assert [(rows.group, rows.start, rows.stop) for rows in packed.groups] == [(0, 0, 1), (1, 1, 2)]
    assert packed.order.tolist() == [1, 0]


def test_a_layers_tensor_is_let_go_once_its_rows_are_gathered() -> None:
    rows = SortedRows()
    hidden = torch.arange(6.0).view(3, 2)
    rows.start(hidden, np.array([2, 0]))
    assert bytes(rows.run(0, 1)) == hidden[2:].numpy().tobytes()
    first = hidden[:1].numpy().tobytes()
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None
    assert bytes(rows.run(1, 2)) == first

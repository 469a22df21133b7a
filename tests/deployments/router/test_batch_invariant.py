"""Batch invariance, bit for bit: alone, in a batch, in any chunks. About 25 s.

The routed experts are the model's own weights, multiplied in tiles as the expert replicas do (`batch_invariant`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from cluster.errors import ConfigError, UnsupportedModelError
from deployments.router import batch_invariant
from deployments.router.backbone import Backbone
from deployments.router.batch_invariant import ROW_TILE, FixedRowParameter, fix_rows, fixed_row_product
from tests import models
from tests.deployments.router.packed import Driver

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (7, 20, 3, 33, 150, 1, 16, 17)


def tiled_experts(module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, H], index and weight [T, K] -> [T, H]; every expert on whole tiles of its rows."""
    count, chosen = index.shape
    rows, flat = hidden.repeat_interleave(chosen, 0), index.flatten()
    out = torch.zeros_like(rows)
    for expert in flat.unique().tolist():
        mine = (flat == expert).nonzero()[:, 0]
        up = product(module, "gate_up_proj", expert, F.pad(rows[mine], (0, 0, 0, -len(mine) % ROW_TILE)))
        out[mine] = product(module, "down_proj", expert, module._apply_gate(up))[: len(mine)]
    return (out * weight.reshape(-1, 1)).view(count, chosen, -1).sum(1).to(hidden.dtype)


def product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    matrix = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return fixed_row_product(rows, matrix if module.is_transposed else matrix.T, bias)


@pytest.fixture(autouse=True, scope="module")
def _tiled_experts() -> Iterator[None]:
    ExpertsInterface.register("tiled", tiled_experts)
    yield
    del ExpertsInterface._global_mapping["tiled"]


def make_backbone(model_type: str, dtype: torch.dtype) -> Backbone:
    model = models.build(model_type, dtype)
    model.set_experts_implementation("tiled")
    return Backbone(model, kv_tokens=1024, batch_invariant=True)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(model_type, torch.float32) for model_type in models.MODEL_TYPES]
    + [(model_type, torch.bfloat16) for model_type in ("deepseek_v3", "gpt_oss", "qwen2_moe", "mixtral")]
    + [("deepseek_v3", torch.float16), ("minimax_m2", torch.float16)],
)
def test_logits_do_not_depend_on_batch_chunk_or_page(model_type: str, dtype: torch.dtype) -> None:
    backbone = make_backbone(model_type, dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    together = Driver(backbone, join_every=2, seed=1).score(prompts, [1, 16, 5, 64, 32])
    at_once = Driver(backbone, join_every=0, seed=2).score(prompts, [1000])
    for prompt, in_batch, in_one in zip(prompts, together, at_once, strict=True):
        [alone] = Driver(backbone).score([prompt[:20]], [1])
        assert torch.equal(in_batch, in_one)
        assert torch.equal(in_batch[:20], alone)


def test_without_it_the_logits_do_depend_on_the_batch() -> None:
    """Else the tests above would prove nothing."""
    model = models.build("deepseek_v3")
    backbone = Backbone(model, kv_tokens=1024)
    prompt = list(range(3, 43))
    [alone] = Driver(backbone).score([prompt], [1])
    [in_one] = Driver(backbone).score([prompt], [1000])
    assert not torch.equal(alone, in_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(64, 16), (192, 100), (256, 1024), (96, 1)])
def test_a_row_has_the_same_product_in_every_place(dtype: torch.dtype, inner: int, outer: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(inner, outer, generator=generator).to(dtype)
    bias = torch.randn(outer, generator=generator).to(dtype)
    row = torch.randn(inner, generator=generator).to(dtype)
    alone = fixed_row_product(row[None], matrix, bias)
    for count in (2, 7, 8, 9, 40):
        for place in {0, 1, count // 2, count - 1}:
            rows = torch.randn(count, inner, generator=generator).to(dtype)
            rows[place] = row
            assert torch.equal(fixed_row_product(rows, matrix, bias)[place], alone[0])
    expected = row.double() @ matrix.double() + bias.double()
    torch.testing.assert_close(alone[0].double(), expected, atol=1e-4 if dtype == torch.float32 else 0.3, rtol=1e-2)


def test_shapes_of_products_are_those_of_linear() -> None:
    weight, bias = torch.randn(5, 4), torch.randn(5)
    for shape in [(4,), (3, 4), (2, 3, 4), (0, 4)]:
        rows = torch.randn(shape)
        found = batch_invariant.fixed_row_linear(rows, weight, bias)
        torch.testing.assert_close(found, F.linear(rows, weight, bias))


class Gate(nn.Module):
    """Multiplies by bare parameters the way gates do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.mix = nn.Parameter(torch.randn(16, 8))
        self.norm = nn.Parameter(torch.randn(16))
        self.layer = nn.Linear(16, 8)
        self.tied = self.weight

    def forward(self, x: Tensor, how: str) -> Tensor:
        ways = {
            "linear": lambda: F.linear(x, self.weight),
            "float": lambda: F.linear(x.float(), self.weight.float()),
            "type": lambda: F.linear(x.type(torch.float32), self.weight.type(torch.float32)),
            "operator": lambda: x @ self.mix,
            "transposed": lambda: torch.matmul(x, self.weight.T),
            "module": lambda: self.layer(x),
            "elementwise": lambda: (x * self.norm) @ self.mix,
            "einsum": lambda: torch.einsum("ti,oi->to", x, self.weight),
        }
        return ways[how]()


@pytest.mark.parametrize("how", ["linear", "float", "type", "operator", "transposed", "module", "elementwise"])
def test_every_usual_way_to_multiply_goes_through_tiles(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, x = Gate().requires_grad_(False), torch.randn(3, 16)
    expected = gate(x, how)
    fix_rows(gate, skip=lambda name: False)  # noqa: ARG005
    heights: list[int] = []
    multiply = torch.mm

    def counting(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        heights.append(left.shape[0])
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counting)
    found = gate(x, how)
    assert heights == [ROW_TILE]
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)


def test_a_product_it_cannot_tile_is_refused() -> None:
    gate = Gate()
    fix_rows(gate, skip=lambda name: False)  # noqa: ARG005
    with pytest.raises(UnsupportedModelError, match="einsum"):
        gate(torch.randn(3, 16), "einsum")


def test_tied_weights_stay_tied_and_vectors_stay_plain() -> None:
    gate = Gate()
    fix_rows(gate, skip=lambda name: name.endswith("mix"))
    assert gate.tied is gate.weight
    assert isinstance(gate.weight, FixedRowParameter)
    assert not isinstance(gate.mix, FixedRowParameter)
    assert not isinstance(gate.norm, FixedRowParameter)


def test_a_machine_that_cannot_keep_the_promise_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_batch(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(rows, weight, bias) * (1 + 1e-6 * rows.shape[-2])

    monkeypatch.setattr(batch_invariant, "fixed_row_linear", by_batch)
    with pytest.raises(ConfigError, match="batch_invariant"):
        make_backbone("mixtral", torch.float32)


def test_several_threads_are_refused() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
            make_backbone("mixtral", torch.float32)
    finally:
        torch.set_num_threads(1)

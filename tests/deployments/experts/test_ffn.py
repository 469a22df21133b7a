"""Expert networks against the naive loop, the reference module, and, put together, the whole model. About 15 s."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cluster.activation import activate
from cluster.checkpoint import MoeFunction, compile_plan, load_router_model
from cluster.load_plan import FfnSpec
from deployments.experts import ffn
from deployments.experts.ffn import expert_ffn
from deployments.experts.weights import GroupWeights, LayerWeights, load_group
from tests import models

GROUPS = ((0, 3, 5), (1,), (2, 4, 6, 7))
SPECS = {
    "gated": FfnSpec(),
    "ungated": FfnSpec(gated=False, activation="relu_squared"),
    "like gpt-oss": FfnSpec(
        interleaved=True, transposed=True, bias=True, activation="swish", alpha=1.702, limit=7.0, up_offset=1.0
    ),
}


def random_weights(spec: FfnSpec, experts: int = 3, hidden: int = 16, inner: int = 24) -> LayerWeights:
    generator = torch.Generator().manual_seed(5)
    up = 2 * inner if spec.gated else inner
    shapes = {spec.up_name: (experts, up, hidden), "down_proj": (experts, hidden, inner)}
    if spec.transposed:
        shapes = {name: (e, b, a) for name, (e, a, b) in shapes.items()}
    if spec.bias:
        shapes |= {f"{spec.up_name}_bias": (experts, up), "down_proj_bias": (experts, hidden)}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return LayerWeights(spec, tuple(range(experts)), hidden, tensors)


def naive(weights: LayerWeights, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """One row at a time, through plain matrix-vector products."""
    spec, tensors = weights.spec, weights.tensors

    def project(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = tensors[name][expert]
        y = x @ weight if spec.transposed else weight @ x
        return y + tensors[f"{name}_bias"][expert] if spec.bias else y

    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    outputs = [
        project("down_proj", expert, activate(spec, project(spec.up_name, expert, row)))
        for expert, row in zip(owners, rows, strict=True)
    ]
    return torch.stack(outputs) if outputs else rows.new_empty(0, weights.hidden)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_every_row_goes_through_its_own_expert(kind: str, batch_invariant: bool, counts: list[int]) -> None:
    weights = random_weights(SPECS[kind])
    rows = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(6))
    actual = expert_ffn(weights, rows, torch.tensor(counts), batch_invariant=batch_invariant)
    assert actual.dtype == rows.dtype
    torch.testing.assert_close(actual, naive(weights, rows, counts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SPECS)
def test_in_batch_invariant_mode_a_row_does_not_depend_on_the_others(kind: str, dtype: torch.dtype) -> None:
    weights = random_weights(SPECS[kind], hidden=192, inner=96)
    weights = LayerWeights(weights.spec, weights.expert_ids, 192, {n: t.to(dtype) for n, t in weights.tensors.items()})
    rows = torch.randn(70, 192, generator=torch.Generator().manual_seed(6)).to(dtype)
    together = expert_ffn(weights, rows, torch.tensor([30, 7, 33]), batch_invariant=True)
    for place, expert in ((0, 0), (29, 0), (33, 1), (69, 2)):
        counts = torch.tensor([int(expert == local) for local in range(3)])
        alone = expert_ffn(weights, rows[place : place + 1], counts, batch_invariant=True)
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", SPECS)
def test_one_expert_alone_gives_the_bits_of_the_grouped_product(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, counts = random_weights(SPECS[kind]), torch.tensor([0, rows, 0])
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(6))
    alone = expert_ffn(weights, x, counts)
    monkeypatch.setattr(ffn, "_single", lambda held, _expert: ffn._grouped(held, counts))
    assert torch.equal(alone, expert_ffn(weights, x, counts))


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1, 0], [1, 1, 2], [4, -1, 0]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="do not cut 3 rows"):
        expert_ffn(random_weights(FfnSpec()), torch.zeros(3, 16), torch.tensor(counts))


def test_rows_in_another_arithmetic_come_back_in_it() -> None:
    weights = random_weights(FfnSpec())
    rows = torch.randn(3, 16).bfloat16()
    assert expert_ffn(weights, rows, torch.tensor([1, 1, 1])).dtype == torch.bfloat16


def test_rows_go_to_the_device_of_the_weights_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held = random_weights(FfnSpec())
    held = replace(held, tensors={name: tensor.to("meta") for name, tensor in held.tensors.items()})
    seen = []

    def run(_weights: object, x: torch.Tensor, _project: object) -> torch.Tensor:
        seen.append(x.device.type)
        return torch.zeros(x.shape)  # the meta device holds no values to bring back

    monkeypatch.setattr(ffn, "_run", run)
    result = expert_ffn(held, torch.randn(3, 16), torch.tensor([1, 1, 1]))
    assert (seen, result.device.type, result.shape) == (["meta"], "cpu", (3, 16))


def test_the_models_own_activation_takes_the_place_of_the_spec() -> None:
    own = replace(random_weights(FfnSpec(fallback="some.module:Class")), own_activation=lambda x: x[:, ::2].sin())
    rows = torch.randn(3, 16)
    expected = torch.stack(
        [down @ (up @ row)[::2].sin() for up, down, row in zip(*own.tensors.values(), rows, strict=True)]
    )
    torch.testing.assert_close(expert_ffn(own, rows, torch.tensor([1, 1, 1])), expected, rtol=1e-4, atol=1e-5)


def load_whole(root: Path, dtype: torch.dtype) -> Any:
    """The whole model in transformers, out of mapped files, whose alignment to 8 bytes changes the last bits."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=dtype, experts_implementation="grouped_mm").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def load_groups(model_type: str, root: Path, dtype: torch.dtype) -> tuple[Any, list[GroupWeights]]:
    plan = compile_plan(models.save(model_type, root, dtype=dtype))
    return plan, [load_group(plan, root, dict.fromkeys(plan.layers, ids), dtype=dtype) for ids in GROUPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_rows_are_bitwise_the_reference_modules(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    plan, groups = load_groups(model_type, tmp_path, dtype)
    whole = load_whole(tmp_path, dtype)
    layer = max(plan.layers)
    module = whole.get_submodule(plan.layers[layer].module)
    for group in groups:
        held = group.layers[layer]
        counts = [(5, 0, 12, 33)[local] for local in range(len(held.expert_ids))]
        rows = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(7)).to(dtype)
        index = torch.repeat_interleave(torch.tensor(held.expert_ids), torch.tensor(counts))[:, None]
        with torch.no_grad():
            expected = module(rows, index, torch.ones(len(rows), 1, dtype=dtype))
        assert torch.equal(expert_ffn(held, rows, torch.tensor(counts)), expected)


def in_process(groups: list[GroupWeights]) -> MoeFunction:
    """The least scatter and gather that works: every group in turn, then transformers' own combine."""

    def moe(layer: int, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        chosen = index.reshape(-1)
        output = hidden.new_empty(len(chosen), hidden.shape[1])
        for group in groups:
            held = group.layers[layer]
            places = [(chosen == expert).nonzero().flatten() for expert in held.expert_ids]
            place = torch.cat(places)
            counts = torch.tensor([len(found) for found in places])
            output[place] = expert_ffn(held, hidden[place // index.shape[1]], counts)
        return (output * weight.reshape(-1, 1)).view(*index.shape, -1).sum(1).to(hidden.dtype)

    return moe


@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_router_and_groups_together_are_the_whole_model(tmp_path: Path, model_type: str) -> None:
    plan, groups = load_groups(model_type, tmp_path, torch.float32)
    whole = load_whole(tmp_path, torch.float32)
    router = load_router_model(tmp_path, plan, dtype=torch.float32, device="cpu", moe=in_process(groups))
    prompt = torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # Groups see fewer rows at a time than the whole model, and kernels may differ in the last bits by row count.
        torch.testing.assert_close(router(prompt).logits, whole(prompt).logits, rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    assert router.generate(prompt, **options).tolist() == whole.generate(prompt, **options).tolist()

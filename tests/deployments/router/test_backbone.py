"""The backbone against the model it wraps, with the model's own experts: 14 types in float32. About 20 s."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.checkpoint import compile_plan
from cluster.errors import ConfigError, UnsupportedModelError
from deployments.router.backbone import Backbone, MoeSwitch, load_backbone
from deployments.router.step import SequenceSlice, StepInput
from tests import models
from tests.deployments.router.packed import Driver

LENGTHS = (7, 20, 3, 33, 50, 1, 16, 17)
TOKENS = 24


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return result[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_packed_chunks_and_staggered_joins_give_the_tokens_of_generate(model_type: str) -> None:
    model = models.build(model_type)
    prompts = make_prompts()
    expected = [generate(model, prompt) for prompt in prompts]
    backbone = Backbone(model, kv_tokens=1024)
    assert Driver(backbone, join_every=2).generate(prompts, TOKENS, chunk=16) == expected


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "qwen2_moe", "dots1", "gpt_oss"])
def test_sliding_windows_are_those_of_the_models_own_masks(model_type: str) -> None:
    kinds = ["sliding_attention", "full_attention"]
    layered = {"layer_types": kinds, "use_sliding_window": True, "max_window_layers": 1}
    window = {"sliding_window": 8, **(layered if model_type in ("qwen2_moe", "dots1") else {})}
    model = models.build(model_type, **window)
    [prompt] = make_prompts((60,))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    backbone = Backbone(model, kv_tokens=256)
    for chunk in (1, 7, 60):
        [found] = Driver(backbone).score([prompt], [chunk])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_stay_near_those_of_the_model(model_type: str, dtype: torch.dtype) -> None:
    model = models.build(model_type, dtype)
    # Without routed experts: near ties between experts would make other tokens of roundings.
    silence(model)
    [prompt] = make_prompts((40,))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float()
    [found] = Driver(Backbone(model, kv_tokens=256)).score([prompt], [9])
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < (0.06 if dtype == torch.bfloat16 else 0.01)


def silence(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            for weight in module.parameters():
                weight.data.zero_()


@pytest.fixture(scope="module")
def small() -> Backbone:
    return Backbone(models.build("deepseek_v3"), kv_tokens=100, page_tokens=16, max_context=77)


def test_it_says_what_the_engine_must_know(small: Backbone) -> None:
    assert (small.vocab_size, small.max_context) == (models.VOCABULARY, 77)
    assert (small.page_tokens, small.num_pages) == (16, 6)
    assert small.eos_token_ids == frozenset()
    # Two layers of one compressed row, 16 latent and 8 rotary values: 8 pages of 16 rows with the two spare ones.
    assert small.kv_pool_bytes == 2 * 8 * 16 * (16 + 8) * 4


def test_end_of_sequence_comes_from_the_generation_settings() -> None:
    model = models.build("olmoe")
    model.generation_config.eos_token_id = [7, 9]
    assert Backbone(model, kv_tokens=64).eos_token_ids == {7, 9}
    model.generation_config.eos_token_id = 5
    assert Backbone(model, kv_tokens=64).eos_token_ids == {5}


def test_only_the_wanted_rows_get_logits_and_in_the_order_asked(small: Backbone) -> None:
    tokens, slices = [5, 6, 7, 8], [SequenceSlice(0, 4, 4, [2])]
    everything = small.forward(StepInput(tokens, range(4), slices, [0, 1, 2, 3]))
    some = small.forward(StepInput(tokens, range(4), slices, [3, 1]))
    torch.testing.assert_close(some, everything[[3, 1]])
    none = small.forward(StepInput(tokens, range(4), slices, []))
    assert none.shape == (0, models.VOCABULARY)
    assert everything.dtype == none.dtype == torch.float32


def test_a_sequence_that_overflowed_leaves_nothing_behind() -> None:
    model = models.build("mixtral")
    with torch.no_grad():
        model.get_input_embeddings().weight[4] = float("nan")
    backbone = Backbone(model, kv_tokens=48, page_tokens=16)
    [alone] = Driver(backbone).score([[5, 6, 7]], [1])
    poisoned = Driver(backbone).score([[5, 6, 7], [4] * 20], [1, 20])
    assert poisoned[1].isnan().all()
    torch.testing.assert_close(poisoned[0], alone)
    for seed in range(4):  # whichever page it gets
        [after] = Driver(backbone, seed=seed).score([[5, 6, 7]], [1])
        torch.testing.assert_close(after, alone)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        (
            "jamba",
            {"num_key_value_heads": 2, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            "linear attention",
        ),
        (
            "deepseek_v32",
            {**models.CONFIGS["deepseek_v3"], "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
            "indexer",
        ),
    ],
)
def test_state_besides_keys_and_values_is_refused_with_the_reason(
    model_type: str, overrides: dict[str, object], reason: str
) -> None:
    model = models.build(model_type, **overrides)
    with pytest.raises(UnsupportedModelError, match=reason):
        Backbone(model, kv_tokens=64)


def test_attention_that_goes_round_the_interface_is_refused() -> None:
    model = models.build("mixtral")
    for layer in model.model.layers:
        layer.self_attn.forward = bypass
    with pytest.raises(UnsupportedModelError, match="paged cache"):
        Backbone(model, kv_tokens=64)


def bypass(hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    """A running mean: it needs the past, and keeps it nowhere."""
    count = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
    return hidden_states.cumsum(1) / count, None


def test_a_pool_below_one_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_tokens"):
        Backbone(models.build("olmoe"), kv_tokens=8, page_tokens=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("deepseek_v3", tmp_path_factory.mktemp("checkpoint"))


def test_loading_never_calls_the_experts_and_a_step_calls_them_once_a_layer(checkpoint: Path) -> None:
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []

    def moe(layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        assert index.shape == weight.shape
        calls.append((layer, tuple(hidden.shape), tuple(index.shape)))
        return torch.ones_like(hidden)

    plan = compile_plan(checkpoint)
    for batch_invariant in (False, True):
        backbone = load_backbone(
            checkpoint,
            plan,
            dtype=torch.float32,
            device="cpu",
            moe=moe,
            kv_tokens=64,
            batch_invariant=batch_invariant,
        )
        assert not calls
        backbone.forward(StepInput([5, 6, 7], range(3), [SequenceSlice(0, 3, 3, [0])], [2]))
        # Padding rows of the batch-invariant form stay at home.
        assert calls == [(1, (3, 64), (3, 2))]
        calls.clear()


def test_padding_rows_get_zeros_from_the_switch() -> None:
    switch = MoeSwitch(lambda layer, hidden, index, weight: hidden + layer)  # noqa: ARG005
    switch.rows = 2
    out = switch(3, torch.ones(4, 2), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    assert out.tolist() == [[4.0, 4.0]] * 2 + [[0.0, 0.0]] * 2

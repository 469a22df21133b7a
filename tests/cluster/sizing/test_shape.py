"""Counts from config.json alone are those of the published models and of loaded ones; refusals are the check's own."""

import json

import pytest
import torch

from cluster.checkpoint import compile_plan, parameter_bytes
from cluster.errors import CheckpointError, ConfigError, UnsupportedModelError
from cluster.sizing.memory import Work, router_memory
from cluster.sizing.shape import read_shape
from deployments.router.backbone import Backbone
from tests import models
from tests.cluster.sizing.shapes import MODELS, PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_a_published_model_are_as_many_as_its_makers_say(name):
    assert read_shape(MODELS / name).total_numbers == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "experts", "layers", "top_k", "kv_bytes", "latent"),
    [
        ("deepseek-v2-lite", 64, 26, 6, 27 * (512 + 64) * 2, True),
        ("mixtral-8x7b", 8, 32, 2, 32 * 2 * 8 * 128 * 2, False),
        ("qwen3-235b-a22b", 128, 94, 8, 94 * 2 * 4 * 128 * 2, False),
        ("deepseek-v3", 256, 58, 8, 61 * (512 + 64) * 2, True),
    ],
)
def test_experts_and_cache_of_a_published_model(name, experts, layers, top_k, kv_bytes, latent):
    shape = read_shape(MODELS / name)
    assert set(shape.experts.values()) == {experts}
    assert (len(shape.experts), shape.top_k, shape.latent) == (layers, top_k, latent)
    assert sum(shape.kv_numbers.values()) * shape.item_bytes == kv_bytes


@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_memory_is_what_a_loaded_router_has(model_type, tmp_path):
    model = models.build(model_type)
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path, "float32")
    routed = sum(parameter_bytes(part) for part in model.modules() if hasattr(part, "_is_expert_parallel"))
    need = router_memory(shape, Work(kv_tokens=256))
    assert need.weights_bytes == parameter_bytes(model) - routed
    assert shape.all_experts_numbers * 4 == routed
    assert shape.top_k == 2
    backbone = Backbone(model, kv_tokens=256)
    assert need.kv_bytes == backbone.kv_pool_bytes
    assert shape.max_context == backbone.max_context
    assert shape.vocabulary == backbone.vocab_size


def test_it_takes_the_file_or_its_folder(tmp_path):
    assert read_shape(MODELS / "mixtral-8x7b" / "config.json") == read_shape(MODELS / "mixtral-8x7b")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^--model: .* allowed: a config.json, or the folder that holds it\.$"):
        read_shape(tmp_path / "other.json")


def changed(tmp_path, name, **changes):
    config = json.loads((MODELS / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return tmp_path


def test_what_the_check_refuses_is_refused_with_its_sentence(tmp_path):
    models.save("mixtral", tmp_path, torch.float32)
    for changes in (
        {"quantization_config": {"quant_method": "fp8"}},
        {"model_type": "llama"},
        {"model_type": "no_such_type"},
    ):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UnsupportedModelError) as sized:
            read_shape(tmp_path)
        with pytest.raises(UnsupportedModelError) as checked:
            compile_plan(tmp_path)
        assert str(sized.value) == str(checked.value)


def test_deepseek_v3_as_published_is_quantised_and_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)"):
        read_shape(changed(tmp_path, "deepseek-v3", quantization_config={"quant_method": "fp8", "fmt": "e4m3"}))


def test_more_experts_a_token_than_there_are_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json names 9 experts a token, but a layer has only 8"):
        read_shape(changed(tmp_path, "mixtral-8x7b", num_experts_per_tok=9))


def test_the_dtype_may_be_asked_for_and_must_be_known(tmp_path):
    assert read_shape(MODELS / "mixtral-8x7b", "float32").item_bytes == 4
    assert read_shape(MODELS / "mixtral-8x7b").item_bytes == 2
    with pytest.raises(ConfigError, match="--dtype: 'int8' is not allowed; allowed: auto, float32, bfloat16, float16"):
        read_shape(MODELS / "mixtral-8x7b", "int8")
    with pytest.raises(ConfigError, match=r"--dtype: config.json states no dtype"):
        read_shape(changed(tmp_path, "mixtral-8x7b", torch_dtype=None))

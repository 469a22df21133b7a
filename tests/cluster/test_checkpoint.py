"""Compiling checkpoints of 14 types and loading the router's half. About 12 s, 4 of them imports."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint import compile_plan, load_router_model, parameter_bytes
from cluster.errors import CheckpointError
from cluster.load_plan import LoadPlan
from tests import models
from tests.checkpoints import edit_config, one_sentence


def unused(*_: object) -> torch.Tensor:
    raise AssertionError("no row should have been sent")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_every_type_compiles_to_a_plan_for_all_its_experts(tmp_path: Path, model_type: str) -> None:
    plan = compile_plan(models.save(model_type, tmp_path))
    first_dense = model_type in {"deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"}
    assert plan.experts_per_layer == dict.fromkeys([1] if first_dense else [0, 1], models.EXPERTS)
    assert plan.model_type == model_type
    assert plan.dtype == "float32"
    assert (plan.max_context, plan.context_reason) == (256, None)
    assert len(plan.files) > 1
    assert not any(layer.spec.fallback for layer in plan.layers.values())
    assert all(layer.hidden == 64 for layer in plan.layers.values())
    assert LoadPlan.from_json(plan.to_json()) == plan


def test_one_file_and_several_shards_give_the_same_experts(tmp_path: Path) -> None:
    sharded = compile_plan(models.save("mixtral", tmp_path / "sharded"))
    single = compile_plan(models.save("mixtral", tmp_path / "single", max_shard_size="1GB"))
    assert len(single.files) == 1 < len(sharded.files)
    assert single.experts_per_layer == sharded.experts_per_layer
    assert single.layers[0].parameters["down_proj"].shape == sharded.layers[0].parameters["down_proj"].shape


def test_the_arithmetic_is_the_checkpoints_unless_asked_otherwise(tmp_path: Path) -> None:
    folder = models.save("olmoe", tmp_path, dtype=torch.bfloat16)
    assert compile_plan(folder).dtype == "bfloat16"
    assert compile_plan(folder, "float16").dtype == "float16"
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert compile_plan(folder).dtype == "bfloat16"


def test_other_weights_of_the_same_shapes_have_another_fingerprint(tmp_path: Path) -> None:
    first = compile_plan(models.save("olmoe", tmp_path / "first"))
    again = compile_plan(models.save("olmoe", tmp_path / "again"))
    other = compile_plan(models.save("olmoe", tmp_path / "other", seed=1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize("changed", ["weights", "config.json"])
def test_a_router_refuses_files_that_are_not_those_of_its_plan(tmp_path: Path, changed: str) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    if changed == "weights":
        models.save("olmoe", tmp_path, seed=1)
    else:
        edit_config(tmp_path, rope_theta=77.0)
    name = plan.files[0].name if changed == "weights" else changed
    with pytest.raises(CheckpointError, match=f"{name} is not the one this deployment was made from") as raised:
        load_router_model(tmp_path, plan, dtype=torch.float32, device="cpu", moe=unused)
    one_sentence(raised)


def test_long_rope_limits_the_context_to_what_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": factors,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": 64,
    }
    plan = compile_plan(models.save("phimoe", tmp_path, rope_parameters=rope))
    assert plan.max_context == 64
    assert plan.context_reason is not None
    assert "longest sequence" in plan.context_reason


def test_an_unknown_arithmetic_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="allowed: auto, float32, bfloat16, float16"):
        compile_plan(models.save("mixtral", tmp_path), "int8")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_router_holds_everything_but_the_experts(tmp_path: Path, model_type: str) -> None:
    whole = models.build(model_type)
    folder = models.save(model_type, tmp_path)
    plan = compile_plan(folder)
    router = load_router_model(folder, plan, dtype=torch.float32, device="cpu", moe=unused)
    experts = {layer.module for layer in plan.layers.values()}
    expected = {n: p for n, p in whole.named_parameters() if n.rpartition(".")[0] not in experts}
    actual = dict(router.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert parameter_bytes(router) == sum(p.numel() * 4 for p in expected.values())
    assert not any(p.is_meta or p.requires_grad for p in actual.values())
    assert not router.training


def test_the_router_never_reads_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.save("mixtral", tmp_path)
    plan = compile_plan(folder)
    read: list[str] = []
    import transformers.core_model_loading as loading

    original = loading.spawn_materialize

    def spy(pool: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(str(tensor.get_shape()))
        return original(pool, tensor, *args, **kwargs)

    monkeypatch.setattr(loading, "spawn_materialize", spy)
    router = load_router_model(folder, plan, dtype=torch.float32, device="cpu", moe=unused)
    assert len(read) == len(router.state_dict())


def test_each_experts_module_calls_out_with_its_layer(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def moe(layer: int, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((layer, tuple(hidden.shape), tuple(index.shape), tuple(weight.shape)))
        return torch.zeros_like(hidden)

    router = load_router_model(folder, compile_plan(folder), dtype=torch.float32, device="cpu", moe=moe)
    with torch.no_grad():
        router(torch.arange(3, 8).view(1, 5))
    assert seen == [(0, (5, 64), (5, 2), (5, 2)), (1, (5, 64), (5, 2), (5, 2))]


def test_tied_embeddings_stay_tied_and_count_once(tmp_path: Path) -> None:
    folder = models.save("olmoe", tmp_path, tie_word_embeddings=True)
    router = load_router_model(folder, compile_plan(folder), dtype=torch.float32, device="cpu", moe=unused)
    assert router.lm_head.weight.data_ptr() == router.model.embed_tokens.weight.data_ptr()
    assert parameter_bytes(router) == sum(p.numel() * 4 for p in router.state_dict().values()) - 256 * 64 * 4


def test_the_attention_implementation_can_be_set_afterwards(tmp_path: Path) -> None:
    folder = models.save("qwen3_moe", tmp_path)
    router = load_router_model(folder, compile_plan(folder), dtype=torch.float32, device="cpu", moe=unused)
    router.set_attn_implementation("eager")
    assert router.config._attn_implementation == "eager"


def test_router_weights_are_aligned_copies(tmp_path: Path) -> None:
    folder = models.save("granitemoe", tmp_path)
    router = load_router_model(folder, compile_plan(folder), dtype=torch.float32, device="cpu", moe=unused)
    assert all(p.data_ptr() % 64 == 0 for p in router.parameters())


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.block_sparse_moe.experts.5.w1.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, key: str) -> None:
    folder = models.save("mixtral", tmp_path, max_shard_size="1GB")
    rewrite(folder, lambda tensors: tensors.__delitem__(key))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")) as error:
        compile_plan(folder)
    one_sentence(error)


def test_all_tensors_of_a_projection_missing_are_named(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path, max_shard_size="1GB")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".w3." in key]:
            del tensors[key]

    rewrite(folder, drop)
    with pytest.raises(CheckpointError, match="w3"):
        compile_plan(folder)


@pytest.mark.parametrize(
    "key", ["model.layers.1.block_sparse_moe.experts.5.w1.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path, key: str) -> None:
    folder = models.save("mixtral", tmp_path, max_shard_size="1GB")
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.") + r" has shape \[3, 5\]") as error:
        compile_plan(folder)
    one_sentence(error)


def test_more_experts_in_the_configuration_than_in_the_files_is_refused(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    edit_config(folder, num_local_experts=9)
    with pytest.raises(CheckpointError, match=r"gate\.weight has shape|experts\.8\."):
        compile_plan(folder)


def test_a_wider_model_than_its_fused_experts_is_refused(tmp_path: Path) -> None:
    folder = models.save("gpt_oss", tmp_path)
    edit_config(folder, intermediate_size=48)
    with pytest.raises(CheckpointError, match="gate_up_proj") as error:
        compile_plan(folder)
    one_sentence(error)


def test_nothing_is_printed_or_logged_on_the_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = models.save("deepseek_v3", tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        compile_plan(folder)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")

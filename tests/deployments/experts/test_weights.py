"""Loading a group's experts: the same bits as the whole model's, slices only, no transformers. About 12 s."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.checkpoint import compile_plan
from cluster.errors import CheckpointError, PlacementError
from cluster.load_plan import LoadPlan, ShardFile
from cluster.shards import content_digest
from deployments.experts import weights as weights_module
from deployments.experts.weights import GroupWeights, ProgressBar, load_group
from tests import models

UNEVEN = ((0, 3, 5), (1,), (7, 2, 4, 6))


def compile_files(plan: LoadPlan, root: Path) -> tuple[ShardFile, ...]:
    """The plan's files as they are now, as if the plan had been made from them."""
    sized = [replace(file, size_bytes=(root / file.name).stat().st_size) for file in plan.files]
    return tuple(replace(file, content=content_digest(root, file)) for file in sized)


def load(plan: LoadPlan, root: Path, ids: tuple[int, ...], dtype: torch.dtype = torch.float32) -> GroupWeights:
    return load_group(plan, root, dict.fromkeys(plan.layers, ids), dtype=dtype)


@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_groups_hold_the_whole_models_experts_bit_for_bit(tmp_path: Path, model_type: str) -> None:
    plan = compile_plan(models.save(model_type, tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    total = 0
    for ids in UNEVEN:
        group = load(plan, tmp_path, ids)
        assert group.layers.keys() == plan.layers.keys()
        expected_bytes = 0
        for layer, held in group.layers.items():
            assert held.expert_ids == tuple(sorted(ids))
            reference = dict(whole.get_submodule(plan.layers[layer].module).named_parameters())
            assert held.tensors.keys() == reference.keys() == set(held.spec.parameter_names)
            for name, tensor in held.tensors.items():
                expected = reference[name][list(held.expert_ids)]
                assert torch.equal(tensor, expected)
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % 64 == 0
                expected_bytes += expected.numel() * 4
        assert group.parameter_bytes == expected_bytes
        total += group.parameter_bytes
    experts = {layer.module for layer in plan.layers.values()}
    assert total == sum(p.numel() * 4 for n, p in whole.named_parameters() if n.rpartition(".")[0] in experts)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_one_file_gives_the_same_weights_as_several(tmp_path: Path, model_type: str) -> None:
    sharded = models.save(model_type, tmp_path / "sharded")
    single = models.save(model_type, tmp_path / "single", max_shard_size="1GB")
    first, second = (load(compile_plan(folder), folder, (1, 6)) for folder in (sharded, single))
    for layer, held in first.layers.items():
        assert all(torch.equal(tensor, second.layers[layer].tensors[name]) for name, tensor in held.tensors.items())


def test_weights_are_converted_to_the_arithmetic_asked_for(tmp_path: Path) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    held = load(plan, tmp_path, (2, 5), torch.bfloat16).layers[1]
    assert held.dtype == torch.bfloat16
    reference = whole.get_submodule(plan.layers[1].module)
    assert torch.equal(held.tensors["down_proj"], reference.down_proj[[2, 5]])


def test_a_group_may_hold_other_experts_in_each_layer_and_none_in_some(tmp_path: Path) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    group = load_group(plan, tmp_path, {0: (), 1: (6, 1)}, dtype=torch.float32)
    assert {layer: held.expert_ids for layer, held in group.layers.items()} == {1: (1, 6)}


class SpyFile:
    """A safetensors file that counts the bytes taken out of it."""

    bytes_read = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = safe_open(*args, **kwargs)

    def __enter__(self) -> SpyFile:
        self._file.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._file.__exit__(*args)

    def get_slice(self, key: str) -> SpySlice:
        return SpySlice(self._file.get_slice(key))


class SpySlice:
    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy

    def __getitem__(self, item: object) -> torch.Tensor:
        tensor: torch.Tensor = self._lazy[item]
        SpyFile.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_only_the_groups_own_bytes_are_read(tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_plan(models.save(model_type, tmp_path))
    monkeypatch.setattr(weights_module, "safe_open", SpyFile)
    SpyFile.bytes_read = 0
    group = load(plan, tmp_path, (2, 5))
    assert SpyFile.bytes_read == group.parameter_bytes


def test_an_expert_replica_never_imports_transformers(tmp_path: Path) -> None:
    plan = compile_plan(models.save("gpt_oss", tmp_path / "model"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    script = f"""
import sys, torch
from pathlib import Path
from cluster.load_plan import LoadPlan
from deployments.experts.ffn import expert_ffn
from deployments.experts.weights import load_group
plan = LoadPlan.from_json(Path({str(tmp_path / "plan.json")!r}).read_text())
group = load_group(plan, Path({str(tmp_path / "model")!r}), {{0: [0, 2]}}, dtype=torch.float32)
assert expert_ffn(group.layers[0], torch.ones(3, 64), torch.tensor([1, 2])).shape == (3, 64)
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_the_models_own_activation_is_called_where_the_spec_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda _, x: x.chunk(2, dim=-1)[0].sin())
    plan = compile_plan(models.save("mixtral", tmp_path))
    assert all(layer.spec.fallback for layer in plan.layers.values())
    with caplog.at_level(logging.WARNING):
        held = load(plan, tmp_path, (0, 1)).layers[0]
    assert "MixtralExperts" in caplog.text
    assert held.own_activation is not None
    x = torch.randn(2, 8)
    assert torch.equal(held.own_activation(x), x[:, :4].sin())


@pytest.mark.parametrize("experts", [{7: [0]}, {0: [8]}, {0: [-1]}, {0: [1, 1]}])
def test_experts_that_do_not_exist_are_refused(tmp_path: Path, experts: dict[int, list[int]]) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    with pytest.raises(PlacementError):
        load_group(plan, tmp_path, experts, dtype=torch.float32)


def test_a_checkpoint_that_changed_since_it_was_compiled_is_refused(tmp_path: Path) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    shard = tmp_path / plan.files[0].name
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=f"{shard.name} has {plan.files[0].size_bytes + 1} bytes.*deploy again"):
        load(plan, tmp_path, (0,))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(plan, tmp_path, (0,))


def test_a_shard_damaged_since_it_was_compiled_is_named(tmp_path: Path) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    for file in plan.files:
        content = (tmp_path / file.name).read_bytes()
        (tmp_path / file.name).write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(CheckpointError, match=f"{plan.files[0].name} is not the one .* deploy again"):
        load(plan, tmp_path, (0,))


def test_other_weights_of_the_same_sizes_are_refused_and_a_copy_with_other_times_is_not(tmp_path: Path) -> None:
    plan = compile_plan(models.save("olmoe", tmp_path))
    first = tmp_path / plan.files[0].name
    os.utime(first, ns=(1, 1))
    load(plan, tmp_path, (0,))
    models.save("olmoe", tmp_path, seed=1)
    assert first.stat().st_size == plan.files[0].size_bytes
    with pytest.raises(CheckpointError, match=f"{first.name} is not the one this deployment was made from"):
        load(plan, tmp_path, (0,))


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    plan = compile_plan(models.save("mixtral", tmp_path))
    seen: list[tuple[int, int]] = []
    load_group(plan, tmp_path, {0: [1, 2], 1: [3]}, dtype=torch.float32, progress=lambda *at: seen.append(at))
    # Two layers' worth of three experts with three tensors each: gate, up, down.
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def lines_of(times: Iterator[float], total: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.INFO):
        bar = ProgressBar("experts-0: loading experts", clock=lambda: next(times))
        for done in range(1, total + 1):
            bar(done, total)
    return [record.message for record in caplog.records]


def test_a_short_load_shows_no_bar(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(iter([0.0, 0.5, 1.0, 1.9]), 3, caplog) == []


def test_a_long_load_shows_a_bar_at_most_once_a_second_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(iter([0.0, 1.0, 2.0, 2.5, 3.1, 3.2]), 5, caplog) == [
        "experts-0: loading experts [#########...............] 2/5 tensors, 2 s",
        "experts-0: loading experts [###################.....] 4/5 tensors, 3 s",
        "experts-0: loading experts [########################] 5/5 tensors, 3 s",
    ]


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_a_tensor_of_another_shape_is_named_even_where_it_would_fit_by_being_repeated(
    tmp_path: Path, model_type: str
) -> None:
    plan = compile_plan(models.save(model_type, tmp_path))
    layer, name = next(iter(plan.layers)), "down_proj"
    key, number = plan.layers[layer].parameters[name].sources[0].locate(0)
    shard = tmp_path / plan.files[number].name
    tensors = load_file(shard)
    fused = plan.layers[layer].parameters[name].sources[0].fused
    tensors[key] = tensors[key][:, :1].contiguous() if fused else tensors[key][:1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    same = replace(plan, files=compile_files(plan, tmp_path))
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} in .*{shard.name} gives expert 0"):
        load(same, tmp_path, (0,))


def test_a_fused_tensor_of_too_few_experts_is_named(tmp_path: Path) -> None:
    plan = compile_plan(models.save("gpt_oss", tmp_path))
    layer = next(iter(plan.layers))
    key, number = plan.layers[layer].parameters["down_proj"].sources[0].locate(0)
    shard = tmp_path / plan.files[number].name
    tensors = load_file(shard)
    tensors[key] = tensors[key][:2].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    files = compile_files(plan, tmp_path)
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} cannot be read"):
        load(replace(plan, files=files), tmp_path, (7,))

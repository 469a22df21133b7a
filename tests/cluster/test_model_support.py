"""Which models are refused, and with what reason. About 8 s, 4 of them imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cluster.errors import CheckpointError, UnsupportedModelError
from cluster.model_support import read_model
from tests import models
from tests.checkpoints import edit_config, one_sentence


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "linear_attention"),
        ("qwen3_5_moe_text", "linear_attention"),
        ("jamba", "linear_attention"),
        ("llama4_text", "Llama4TextExperts"),
        ("deepseek_v32", "indexed_attention"),
        ("jetmoe", "JetMoeParallelExperts"),
        ("llama", "no routed experts"),
        ("switch_transformers", "no decoder-only language model"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_with_the_reason(tmp_path: Path, model_type: str, reason: str) -> None:
    AutoConfig.for_model(model_type, num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        read_model(tmp_path)
    assert "supported are" in one_sentence(error)


def test_code_from_the_folder_is_refused(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_moe", "auto_map": auto_map}))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(UnsupportedModelError, match="never run") as error:
        read_model(tmp_path)
    one_sentence(error)


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = models.save("mixtral", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)") as error:
        read_model(folder)
    one_sentence(error)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_model(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_model(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "unheard"}])
def test_a_configuration_that_makes_no_model_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = models.save("mixtral", tmp_path)
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_model(folder)
    one_sentence(error)

"""Tiny random models of every supported type, written to disk the way `save_pretrained` writes real ones.

Weights are drawn again with a standard deviation of about 0.2 (smaller ones let the outputs degenerate to one token),
buffers that bias the choice of experts too. Vocabulary 256, no end-of-sequence token: `generate` runs to length.
Knows nothing of ExpertScale. Building takes about 0.1 s a model once the model class is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 256
EXPERTS = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
    },
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 32, "num_key_value_heads": 4, "num_experts": EXPERTS},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": EXPERTS,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        **_MLA,
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    },
    "deepseek_v3": {**_MLA, **_DEEPSEEK, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "minimax_m2": {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": EXPERTS},
    "granitemoe": {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": EXPERTS},
    "phimoe": {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": EXPERTS},
    "dots1": {**_DEEPSEEK, "num_key_value_heads": 2, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "moe_topk": 2,
    },
}
MODEL_TYPES = tuple(CONFIGS)


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `model_type` with random weights; `overrides` replace configuration values."""
    config = AutoConfig.for_model(model_type, **{**_COMMON, **CONFIGS.get(model_type, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.05)
    # `generate` must run to the requested length: no end of sequence, whatever the type's default is.
    model.generation_config.eos_token_id = None
    return model


def save(
    model_type: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "200KB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write `build(...)` to `folder` by `save_pretrained`, in several shards by default; returns `folder`."""
    build(model_type, dtype, seed, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder

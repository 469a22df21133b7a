"""The models the benchmarks run: the demo, and `deepseek6`, a DeepSeek-V3 of six layers with random weights.

Knows files and application arguments; runs no model. deepseek6 is written once a run into the scratch folder. Its
weights are drawn with a standard deviation of 0.2, as smaller ones let the outputs degenerate to one token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.config import AppConfig, parse_args, resolve
from deployments import config_file
from infra.bench.context import Context

DEMO_CONFIG = "deployments/configs/demo.yaml"
SEED = 6
STD, CORRECTION_STD = 0.2, 0.05

_DEEPSEEK6: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class BenchModel:
    """application: the one entry of `applications` in a file for `serve run`."""

    name: str
    application: Mapping[str, Any]

    @property
    def args(self) -> AppConfig:
        """The application's arguments, validated."""
        return parse_args(self.application["args"])

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return resolve(self.args.model.path)

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return int(json.loads((self.folder / "config.json").read_text())["vocab_size"])

    def write_config(self, folder: Path) -> Path:
        """A file for `serve run` in `folder`; returns its path. (JSON is YAML.)"""
        path = folder / f"serve-{self.name}.yaml"
        path.write_text(json.dumps({"applications": [self.application]}))
        return path


def demo() -> BenchModel:
    """The demo model as `make serve` runs it, with the placement that separates its domains."""
    return BenchModel("demo", config_file.read(resolve(DEMO_CONFIG)).document["applications"][0])


def deepseek6(context: Context, layers: int = 6) -> BenchModel:
    """DeepSeek-V3: `layers` layers (the first dense), 256 wide, 16 experts, top-2; written at the first call."""
    name = f"deepseek{layers}"
    folder = context.keep(name, lambda: _written(context.scratch / name, layers))
    args = demo().application["args"]
    changed = {
        "model": {"path": str(folder), "name": name, "dtype": "float32"},
        "experts": {**args["experts"], "placement": "contiguous"},
        "router": args["router"],
    }
    return BenchModel(name, {**demo().application, "args": changed})


def models(context: Context) -> tuple[BenchModel, ...]:
    """Both models of the issue; in a smoke run only a small random one."""
    return (deepseek6(context, layers=2),) if context.smoke else (demo(), deepseek6(context))


@contextmanager
def _written(folder: Path, layers: int) -> Iterator[Path]:
    """Weights, and the demo's tokeniser and chat template, which fit the same vocabulary."""
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=layers, **_DEEPSEEK6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, STD)
            for name, buffer in model.named_buffers():
                if "e_score_correction_bias" in name:
                    buffer.normal_(0, CORRECTION_STD)
    model.save_pretrained(folder)
    for source in demo().folder.iterdir():
        if not (folder / source.name).exists() and source.suffix != ".safetensors":
            shutil.copy(source, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)

"""Read a checkpoint's configuration, build its model without memory, and say whether it can be split and served.

Everything is decided from the model's structure; no list of model types. Imports transformers inside functions.
Knows no weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import CheckpointError, UnsupportedModelError

ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types whose whole state is keys and values, which is what the router's engine pages."""

SUPPORTED = (
    "supported are decoder-only language models with full or sliding-window attention, a key-value cache, and experts "
    "that follow transformers' experts interface (Mixtral, Qwen MoE, DeepSeek-V2/V3, gpt-oss, GLM-4 MoE and their kind)"
)

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """A supported model: its configuration, the model on the meta device, and its experts modules by layer."""

    config: Any
    model: Any
    experts: dict[int, tuple[str, Any]]


def read_model(root: Path) -> ModelShape:
    """The model of the checkpoint in `root`, without weights, checked to be one that can be split.

    Raises:
        CheckpointError: the folder or its config.json is missing or damaged.
        UnsupportedModelError: the model cannot be split or served; the message says why.
    """
    config = read_config(root)
    model = build_on_meta(config)
    experts, reasons = _find_experts(model)
    reasons = [*_state_reasons(config, model), *reasons]
    if reasons:
        raise UnsupportedModelError(f"a {config.model_type} model {', and '.join(reasons)}; {SUPPORTED}.")
    return ModelShape(config, model, experts)


def read_config(root: Path) -> Any:
    """The transformers configuration in `root`, never running code from the folder.

    Raises:
        CheckpointError, UnsupportedModelError: as `read_model`.
    """
    raw = _read_raw_config(root)
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING:
        code = " and brings its own code (auto_map), which is never run" if "auto_map" in raw else ""
        raise UnsupportedModelError(
            f"the model type {model_type!r} of {root} is unknown to the installed transformers{code}; {SUPPORTED}."
        )
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedModelError(
            f"the checkpoint {root} is quantised ({method}); only plain float32, bfloat16 and float16 weights are "
            "read: dequantise it first."
        )
    try:
        return AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{root / 'config.json'} is not a valid configuration of a {model_type} model: {first_line(error)}."
        ) from None


def build_on_meta(config: Any) -> Any:
    """The causal language model of `config` with all tensors on the meta device.

    Raises:
        UnsupportedModelError: there is no such model for this configuration.
        CheckpointError: the configuration is inconsistent.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"a {config.model_type} model is no decoder-only language model; {SUPPORTED}.")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"config.json does not describe a {config.model_type} model that can be built: {first_line(error)}."
        ) from None


def max_context(config: Any) -> tuple[int, str | None]:
    """Most tokens of one sequence, and the reason where that is less than the model's own limit.

    Rotary embeddings of the types "dynamic" and "longrope" change for all positions once the longest sequence of the
    batch exceeds the original length; a token must not depend on its neighbours, so the context ends there.
    """
    text = config.get_text_config()
    limit = int(text.max_position_embeddings)
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        kind = str(rope.get("rope_type", "default"))
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if ("dynamic" in kind or kind == "longrope") and original and int(original) < limit:
            reason = (
                f"{kind} rotary embeddings depend on the longest sequence of the batch beyond {int(original)} tokens"
            )
            return int(original), reason
    return limit, None


def _read_raw_config(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise CheckpointError(f"the checkpoint folder {root} does not exist; expected a folder with config.json.")
    path = root / "config.json"
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {root} lacks config.json.")
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{path} must be an object with a `model_type`.")
    return raw


def _state_reasons(config: Any, model: Any) -> list[str]:
    """Why the router's engine, which keeps keys and values from token to token and nothing else, cannot run a model."""
    reasons = []
    text = config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_TYPES)
    convolutions = any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
    if kinds:
        reasons.append(
            f"has layers of type {', '.join(kinds)}, where the engine keeps the keys and values of full and "
            "sliding-window attention and no other state"
        )
    elif getattr(model, "_is_stateful", False) or convolutions:
        reasons.append("has recurrent state (state-space, convolution or linear-attention layers)")
    if not getattr(model, "_supports_attention_backend", False):
        reasons.append("has attention that does not go through transformers' attention interface")
    if not getattr(text, "max_position_embeddings", None):
        reasons.append("states no max_position_embeddings")
    return reasons


def _find_experts(model: Any) -> tuple[dict[int, tuple[str, Any]], list[str]]:
    """Layer -> (name, module) of every experts module that follows the experts interface, and why it may not do."""
    experts: dict[int, tuple[str, Any]] = {}
    reasons = []
    for name, module in model.named_modules():
        if not (hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")):
            continue
        layer = _LAYER.search(name)
        if layer is None or int(layer[1]) in experts:
            reasons.append(f"has experts ({name}) that do not belong to one decoder layer of their own")
        else:
            experts[int(layer[1])] = (name, module)
    other = sorted({type(module).__name__ for module in model.modules() if _looks_like_experts(module)})
    if other:
        reasons.append(f"has experts ({', '.join(other)}) that do not follow transformers' experts interface")
    elif not experts:
        reasons.append("has no routed experts as configured")
    return experts, reasons


def _looks_like_experts(module: Any) -> bool:
    """Whether a module holds routed experts in a form of its own (a list of MLPs, or fused but undecorated)."""
    name = type(module).__name__.lower()
    return "experts" in name and "shared" not in name and not hasattr(module, "_is_expert_parallel")


def first_line(error: Exception) -> str:
    """What `error` says, as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

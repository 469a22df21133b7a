"""The numbers of a model, counted on the meta device: no weight is read, no memory taken.

Accepts and refuses what `python -m deployments.app check` does, with its sentences, short of what only the shards can
tell. Imports torch and transformers inside functions. Knows no bytes of a device and no fleet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.errors import CheckpointError, ConfigError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """What sizing knows of a model. Numbers are counts of weights or of values, not bytes.

    hidden: width H of a row. layers: decoder layers, with experts or without. experts: layer -> routed experts in it.
    expert_numbers: layer -> numbers of one of its experts. top_k: experts per token.
    router_numbers: all weights that are no routed expert's; of these embedding_numbers are only looked up, a row a
    token, and shared_numbers are the shared experts'.
    kv_numbers: layer -> numbers that one token leaves in the KV pool. expanded_numbers: what a long chunk makes of one
        token's latent while a layer attends, 0 where there are no latents (no MLA).
    widest: most values of one token between two products of the router; expert_widest: the same in an expert.
    """

    model_type: str
    dtype: str
    hidden: int
    vocabulary: int
    layers: int
    experts: dict[int, int]
    expert_numbers: dict[int, int]
    top_k: int
    router_numbers: int
    embedding_numbers: int
    shared_numbers: int
    kv_numbers: dict[int, int]
    expanded_numbers: int
    widest: int
    expert_widest: int
    max_context: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the model's arithmetic."""
        return ITEM_BYTES[self.dtype]

    @property
    def all_experts_numbers(self) -> int:
        """Numbers of all routed experts."""
        return sum(count * self.expert_numbers[layer] for layer, count in self.experts.items())

    @property
    def total_numbers(self) -> int:
        """Numbers of the whole model: what its makers call its parameters."""
        return self.router_numbers + self.all_experts_numbers

    @property
    def latent(self) -> bool:
        """Whether the pool holds latents (MLA)."""
        return self.expanded_numbers > 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer; of the largest where layers differ."""
        return max(self.expert_numbers.values()) * self.item_bytes

    @property
    def places(self) -> int:
        """Experts of all layers together: what devices must find room for."""
        return sum(self.experts.values())


def read_shape(model: Path, dtype: str = "auto") -> Shape:
    """The shape of the model in a folder with a config.json, or of that file.

    Raises:
        CheckpointError, UnsupportedModelError: as `cluster.checkpoint.compile_plan`, as far as config.json tells.
        ConfigError: the dtype is not allowed, or nobody says which.
    """
    from cluster import ffn_probe, model_support

    found = model_support.read_model(_folder(model))
    modules = {type(module): module for _, module in found.experts.values()}
    for module in modules.values():
        ffn_probe.derive_spec(module)
    whole = found.model
    experts_modules = {layer: module for layer, (_, module) in found.experts.items()}
    routed = {id(p) for module in experts_modules.values() for p in module.parameters()}
    rest = {id(p): p.numel() for p in whole.parameters() if id(p) not in routed}
    embedding, head = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    kv, expanded = _kv_numbers(whole, found.config)
    text = found.config.get_text_config()
    top_k = _top_k(whole, found.experts, text)
    if top_k > (fewest := min(int(module.num_experts) for module in experts_modules.values())):
        raise CheckpointError(f"config.json names {top_k} experts a token, but a layer has only {fewest}.")
    return Shape(
        model_type=found.config.model_type,
        dtype=_dtype(dtype, getattr(found.config, "dtype", None)),
        hidden=int(text.hidden_size),
        vocabulary=int(head.shape[0]),
        layers=len(kv),
        experts={layer: int(module.num_experts) for layer, module in sorted(experts_modules.items())},
        expert_numbers={layer: _expert_numbers(module) for layer, module in sorted(experts_modules.items())},
        top_k=top_k,
        router_numbers=sum(rest.values()),
        embedding_numbers=0 if embedding is head else embedding.numel(),
        shared_numbers=_shared_numbers(whole),
        kv_numbers=kv,
        expanded_numbers=expanded,
        widest=_widest(whole, head),
        expert_widest=max(max(p.shape[1:]) for module in modules.values() for p in module.parameters()),
        max_context=model_support.max_context(found.config)[0],
    )


def _folder(model: Path) -> Path:
    if not model.is_file():
        return model
    if model.name != "config.json":
        raise CheckpointError(f"--model: {model} is not allowed; allowed: a config.json, or the folder that holds it.")
    return model.parent


def _dtype(asked: str, declared: object) -> str:
    if asked != "auto":
        if asked not in ITEM_BYTES:
            raise ConfigError(f"--dtype: {asked!r} is not allowed; allowed: auto, {', '.join(ITEM_BYTES)}.")
        return asked
    name = str(declared).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigError(f"--dtype: config.json states no dtype that is served; give one of {', '.join(ITEM_BYTES)}.")
    return name


def _expert_numbers(module: Any) -> int:
    return sum(int(p.numel()) for p in module.parameters()) // int(module.num_experts)


def _top_k(model: Any, experts: dict[int, tuple[str, Any]], text: Any) -> int:
    """From the gate beside the experts, whatever its model calls the setting."""
    for name, _ in experts.values():
        beside = model.get_submodule(name.rpartition(".")[0])
        found = [k for part in beside.modules() if isinstance(k := getattr(part, "top_k", None), int)]
        if found:
            return max(found)
    return int(text.num_experts_per_tok)


def _shared_numbers(model: Any) -> int:
    """Of the modules called shared_expert, shared_experts, shared_mlp and alike."""
    return sum(
        int(p.numel())
        for name, module in model.named_modules()
        if name.rpartition(".")[2].startswith("shared_")
        for p in module.parameters()
    )


def _kv_numbers(model: Any, config: Any) -> tuple[dict[int, int], int]:
    """`Shape.kv_numbers` and `expanded_numbers`, as the router's cache and attention have them.

    DeepSeek-V3: 512 + 64 in each of 61 layers, and of one token 128 heads x (128 + 128 as projected, 192 of keys and as
    many of values, which are padded to that width) = 81,920 numbers expanded.
    """
    text = config.get_text_config()
    rows: dict[int, int] = {}
    expanded = 0
    for _, module in model.named_modules():
        layer = cast(int, getattr(module, "layer_idx", -1))
        if all(hasattr(module, part) for part in ("expand_kv", "kv_b_proj")):
            rows[layer] = int(module.kv_b_proj.weight.shape[1]) + int(module.qk_rope_head_dim)
            heads = int(module.kv_b_proj.weight.shape[0]) // (int(module.qk_nope_head_dim) + int(module.v_head_dim))
            keys = heads * (int(module.qk_nope_head_dim) + int(module.qk_rope_head_dim))
            expanded = max(expanded, int(module.kv_b_proj.weight.shape[0]) + 2 * keys)
        elif hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            rows[layer] = int(module.k_proj.weight.shape[0]) + int(module.v_proj.weight.shape[0])
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    usual = 2 * width * int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return {layer: rows.get(layer, usual) for layer in range(int(text.num_hidden_layers))}, expanded


def _widest(model: Any, head: Any) -> int:
    """The most columns of any product of the router but the last, which `vocabulary` tells."""
    from torch import nn

    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head]
    return max(widths, default=0)

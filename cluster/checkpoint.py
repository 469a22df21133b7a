"""A Hugging Face checkpoint folder -> load plan, and -> the router's model without a single expert weight.

Follows transformers' own loading: whatever `from_pretrained` reads, these read, bit for bit, through its conversion
mapping. transformers is imported inside functions, so that importing this file costs nothing. Safetensors only, local
files only, never code from the folder. Knows no placement, no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from cluster import conversion, ffn_probe, model_support
from cluster.errors import CheckpointError
from cluster.load_plan import FfnSpec, LayerPlan, LoadPlan, Recipe
from cluster.model_support import first_line
from cluster.shards import Shards, check_files, config_digest, content_digest, read_shards

MoeFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, H], expert index [T, K], weight [T, K]) -> combined output [T, H]."""

IMPLEMENTATION = "expertscale"
"""Name of our entry in transformers' experts interface."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def compile_plan(path: Path, dtype: str = "auto") -> LoadPlan:
    """Compile the load plan of the checkpoint in `path`, reading headers and samples only.

    dtype: "float32", "bfloat16", "float16", or "auto" for what the checkpoint says.

    Raises:
        CheckpointError: the folder is missing, damaged or incomplete; one sentence names the file and what is expected.
        UnsupportedModelError: the model cannot be split or served; one sentence says why.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise CheckpointError(f"model.dtype: {dtype!r} is not allowed; allowed: auto, {', '.join(_DTYPES)}.")
    shape = model_support.read_model(path)
    shards = read_shards(path)
    arrivals = conversion.collect(shape.model, shards)
    modules = {name for name, _ in shape.experts.values()}
    conversion.check_router_parameters(shape.model, arrivals, shards, modules)
    specs: dict[object, FfnSpec] = {}
    layers = {}
    for layer, (name, module) in sorted(shape.experts.items()):
        like = (type(module), tuple(sorted((key, repr(value)) for key, value in _scalars(module))))
        spec = specs[like] if like in specs else specs.setdefault(like, ffn_probe.derive_spec(module))
        recipes = {
            parameter: conversion.recipe(
                f"{name}.{parameter}", tuple(value.shape), arrivals.get(f"{name}.{parameter}"), shards
            )
            for parameter, value in module.named_parameters()
        }
        layers[layer] = _layer_plan(layer, name, module.num_experts, spec, recipes)
    limit, reason = model_support.max_context(shape.config)
    plan = LoadPlan(
        model_type=shape.config.model_type,
        dtype=cast(Any, _resolve_dtype(dtype, shape.config, layers, shards)),
        layers=layers,
        files=tuple(replace(file, content=content_digest(path, file)) for file in shards.files),
        max_context=limit,
        context_reason=reason,
        config=config_digest(path),
    )
    return plan.with_fingerprint()


def load_router_model(
    path: Path, plan: LoadPlan, *, dtype: torch.dtype, device: torch.device | str, moe: MoeFunction
) -> Any:
    """The whole model except its experts, each of whose modules calls `moe` with its decoder layer's number.

    Expert weights are neither read nor allocated. Every other weight is an own, aligned copy: mapped file memory is
    aligned to 8 bytes only, which changes the last bits of matrix products. Frozen and in evaluation mode.

    Raises:
        CheckpointError: the checkpoint changed since `plan` was compiled, or lacks a weight.
    """
    from transformers.integrations.moe import ExpertsInterface
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    check_files(plan, path)
    ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
    config = model_support.read_config(path)
    modules = {layer_plan.module: layer for layer, layer_plan in plan.layers.items()}
    try:
        router_class = _without_experts(_get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING), modules, moe)
        model, info = router_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            experts_implementation=IMPLEMENTATION,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the router's model cannot be loaded from {path}: {first_line(error)}.") from error
    lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise CheckpointError(f"the checkpoint {path} lacks the weight {lost[0]} or has it in another shape.")
    model = model.to(device).eval().requires_grad_(False)
    _own_memory(model)
    return model


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all distinct parameters; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _experts_forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Our entry in the experts interface: hidden [T, H], index and weight [T, K] -> [T, H]."""
    moe: MoeFunction = module.expertscale_moe
    return moe(module.expertscale_layer, hidden, index, weight)


def _without_experts(base: Any, layers: dict[str, int], moe: MoeFunction) -> Any:
    """A class like `base` whose experts modules own no parameters and know their layer.

    It keeps name and module of `base`, by which transformers finds conversion mappings and checks attention support.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for name, layer in layers.items():
            module = self.get_submodule(name)
            for parameter in list(module._parameters):
                del module._parameters[parameter]
            module._is_hf_initialized = True
            module.expertscale_layer = layer
            module.expertscale_moe = moe

    ignored = {rf"^{name.replace('.', chr(92) + '.')}\." for name in layers}
    return type(
        base.__name__,
        (base,),
        {
            "__init__": __init__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "_keys_to_ignore_on_load_unexpected": set(base._keys_to_ignore_on_load_unexpected or ()) | ignored,
        },
    )


def _own_memory(model: torch.nn.Module) -> None:
    """Move every tensor from mapped files to fresh, aligned memory. Ties survive: they share the Parameter itself."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _layer_plan(layer: int, name: str, experts: int, spec: FfnSpec, recipes: dict[str, Recipe]) -> LayerPlan:
    up = recipes[spec.up_name].shape
    return LayerPlan(layer, name, experts, up[0] if spec.transposed else up[1], spec, recipes)


def _scalars(module: Any) -> Iterator[tuple[str, object]]:
    """What may differ between the experts modules of two layers besides their weights."""
    for name, value in vars(module).items():
        if isinstance(value, int | float | str | bool):
            yield name, value
    yield "act_fn", getattr(module, "act_fn", None)


def _resolve_dtype(dtype: str, config: Any, layers: dict[int, LayerPlan], shards: Shards) -> str:
    """The arithmetic to compute in: as asked, else as config.json says, else as the experts are stored."""
    if dtype != "auto":
        return dtype
    declared = getattr(config, "dtype", None)
    for name, value in _DTYPES.items():
        if declared in (value, name):
            return name
    first = next(iter(layers.values()))
    key, _ = first.parameters["down_proj"].sources[0].locate(0)
    stored = shards.tensors[key].dtype
    if stored not in _STORED:
        raise CheckpointError(f"the tensor {key} is stored as {stored}; allowed: {', '.join(_STORED)}.")
    return _STORED[stored]

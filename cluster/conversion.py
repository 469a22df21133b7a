"""Translate transformers' own checkpoint conversion into recipes that need no transformers.

Follows `convert_and_load_state_dict_in_model` of transformers 5.23 (core_model_loading.py): every checkpoint key is
renamed, keys that feed one parameter are collected per source pattern in natural order, so that a key's place in the
list is its expert, and the converter's operations are applied. Here the operations are written down instead.
Semi-private functions of transformers: pinned exactly. Knows no file formats beyond shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import CheckpointError, UnsupportedModelError
from cluster.load_plan import EXPERT, Operation, Recipe, Source
from cluster.shards import Shards, TensorInfo


@dataclass
class Arrivals:
    """Checkpoint keys that feed one parameter. converter: None where the tensor is taken as it is."""

    converter: Any = None
    keys: dict[str, list[str]] = field(default_factory=dict)


def collect(model: Any, shards: Shards) -> dict[str, Arrivals]:
    """Parameter or buffer name -> the checkpoint keys that feed it, for a model on the meta device.

    A converter with several targets is listed under the first, as in transformers. Keys that feed nothing are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    arrivals: dict[str, Arrivals] = {}
    for key in sorted(shards.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        arrival = arrivals.setdefault(name, Arrivals())
        if pattern is not None:
            arrival.converter = by_pattern[pattern]
        arrival.keys.setdefault(pattern or key, []).append(key)
    return arrivals


def check_router_parameters(model: Any, arrivals: Mapping[str, Arrivals], shards: Shards, experts: set[str]) -> None:
    """Check that the checkpoint holds every parameter outside the modules named in `experts`, in its shape.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    fed = set(arrivals)
    for name, arrival in arrivals.items():
        if arrival.converter is not None:
            first = arrival.converter.target_patterns[0]
            fed |= {name.replace(first, target) for target in arrival.converter.target_patterns}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in experts:
            continue
        if name not in fed:
            if name in tied or any(pattern.search(name) for pattern in ignored):
                continue
            raise CheckpointError(f"the checkpoint lacks the tensor {name}, which its config.json calls for.")
        if name in arrivals and arrivals[name].converter is None:
            key = next(iter(arrivals[name].keys.values()))[0]
            _check_shape(key, shards.tensors[key], tuple(value.shape))


def recipe(name: str, shape: tuple[int, ...], arrival: Arrivals | None, shards: Shards) -> Recipe:
    """How the experts parameter `name` of `shape` [E, ...] comes from the checkpoint.

    Raises:
        CheckpointError: an expert's tensor is missing or has another shape.
        UnsupportedModelError: its conversion has an operation that cannot be applied to one expert at a time.
    """
    if arrival is None:
        raise CheckpointError(f"the checkpoint lacks the experts' tensors for {name}.")
    experts, target = shape[0], shape[1:]
    patterns = [next(iter(arrival.keys))] if arrival.converter is None else arrival.converter.source_patterns
    absent = [pattern for pattern in patterns if pattern not in arrival.keys]
    if absent:
        raise CheckpointError(f"the checkpoint lacks the tensors {absent[0]!r} that make up {name}.")
    merged = arrival.converter is not None and _merges(arrival.converter)
    sources, pieces = [], []
    for pattern in patterns:
        source, piece = _source(name, arrival.keys[pattern], experts, merged, shards)
        sources.append(source)
        pieces.append(piece)
    operations = _operations(name, arrival, pieces, target)
    result = _apply_shapes(pieces, operations)
    if result != target:
        first = arrival.keys[patterns[0]][0]
        raise CheckpointError(
            f"the tensor {first} and its like make {name} {[experts, *result]} where its config.json calls for "
            f"{list(shape)}."
        )
    return Recipe(target, tuple(sources), operations)


def _merges(converter: Any) -> bool:
    return any(type(operation).__name__ == "MergeModulelist" for operation in converter.operations)


def _source(name: str, keys: list[str], experts: int, merged: bool, shards: Shards) -> tuple[Source, tuple[int, ...]]:
    """The source behind one pattern, and the shape of one expert's piece of it."""
    if not merged:
        info = shards.tensors[keys[0]]
        if not info.shape or info.shape[0] != experts:
            raise CheckpointError(
                f"the tensor {keys[0]} has shape {list(info.shape)}, but its first dimension must be the "
                f"{experts} experts of {name}."
            )
        return Source(keys[0], True, (info.file,)), info.shape[1:]
    key = _with_placeholder(keys)
    expected = [key.replace(EXPERT, str(expert)) for expert in range(experts)]
    missing = sorted(set(expected) - set(keys), key=expected.index)
    if missing:
        raise CheckpointError(f"the checkpoint lacks the tensor {missing[0]}, one expert of {name}.")
    if len(keys) != experts:
        raise CheckpointError(f"the checkpoint has {len(keys)} experts for {name}, but its config.json says {experts}.")
    infos = [shards.tensors[expert_key] for expert_key in expected]
    for expert_key, info in zip(expected, infos, strict=True):
        _check_shape(expert_key, info, infos[0].shape)
    return Source(key, False, tuple(info.file for info in infos)), infos[0].shape


def _with_placeholder(keys: list[str]) -> str:
    """The keys' common form, with `EXPERT` where they differ: x.0.w, x.1.w -> x.{expert}.w."""
    parts = [key.split(".") for key in keys]
    for place, column in enumerate(zip(*parts, strict=False)):
        if len(set(column)) > 1:
            return ".".join([*parts[0][:place], EXPERT, *parts[0][place + 1 :]])
    return keys[0]


def _operations(
    name: str, arrival: Arrivals, pieces: list[tuple[int, ...]], target: tuple[int, ...]
) -> tuple[Operation, ...]:
    """The converter's operations on one expert's pieces: every dimension is one less than on the stacked tensor."""
    operations: list[Operation] = []
    for operation in arrival.converter.operations if arrival.converter is not None else ():
        kind = type(operation).__name__
        dims = tuple(getattr(operation, dim) - 1 for dim in ("dim", "dim0", "dim1") if hasattr(operation, dim))
        if kind == "MergeModulelist" and dims == (-1,):
            continue
        if kind == "Transpose" and min(dims) >= 0:
            if not (operation.check_dims and pieces[0] == target):
                operations.append(Operation("transpose", dims))
        elif kind == "Concatenate" and min(dims) >= 0:
            operations.append(Operation("concatenate", dims))
        else:
            raise UnsupportedModelError(
                f"{name} is converted by {kind}, which cannot be done expert by expert; supported are merging, "
                "concatenating and transposing."
            )
    return tuple(operations)


def _apply_shapes(pieces: list[tuple[int, ...]], operations: tuple[Operation, ...]) -> tuple[int, ...]:
    """Shape of one expert's parameter after `operations`; () where they do not fit."""
    shapes = [list(piece) for piece in pieces]
    for operation in operations:
        if max(operation.dims) >= min(map(len, shapes)):
            return ()
        if operation.name == "transpose":
            first, second = operation.dims
            for shape in shapes:
                shape[first], shape[second] = shape[second], shape[first]
        else:
            dim = operation.dims[0]
            joined = list(shapes[0])
            joined[dim] = sum(shape[dim] for shape in shapes)
            if any(shape[:dim] + shape[dim + 1 :] != joined[:dim] + joined[dim + 1 :] for shape in shapes):
                return ()
            shapes = [joined]
    return tuple(shapes[0]) if len(shapes) == 1 else ()


def _check_shape(key: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(f"the tensor {key} has shape {list(info.shape)}, expected {list(shape)}.")

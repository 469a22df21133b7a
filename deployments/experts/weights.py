"""Load the weights of a group's experts, and nothing else, by executing a load plan. Torch and safetensors only.

Reads one expert's slice at a time into its final place, so the peak is the group plus one expert; never a whole shard,
never a whole fused tensor. Knows no model types and, unless the plan says that it must, no transformers.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, PlacementError
from cluster.load_plan import FfnSpec, LayerPlan, LoadPlan, Recipe
from cluster.shards import check_files

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(tensors loaded, tensors in all)."""


@dataclass(frozen=True)
class LayerWeights:
    """The weights of some experts of one layer.

    expert_ids: ascending; position in it is the local index. hidden: width of a row that comes back.
    tensors: parameter name -> [E_local, ...], contiguous, aligned to 64 bytes on the CPU.
    own_activation: the model's own code where the spec is not enough, else None.
    """

    spec: FfnSpec
    expert_ids: tuple[int, ...]
    hidden: int
    tensors: dict[str, torch.Tensor]
    own_activation: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic the experts compute in."""
        return self.tensors["down_proj"].dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.tensors["down_proj"].device


@dataclass(frozen=True)
class GroupWeights:
    """The weights of one group: layers in which it has experts."""

    layers: dict[int, LayerWeights]

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all its weights."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers.values()
            for tensor in layer.tensors.values()
        )


def load_group(
    plan: LoadPlan,
    root: Path,
    experts: Mapping[int, Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> GroupWeights:
    """Load the experts of one group: `experts[layer]` are their ids, in any order.

    Raises:
        PlacementError: a layer or an expert that the plan does not have.
        CheckpointError: the checkpoint is not the one the plan was compiled from, or is damaged.
    """
    chosen = {layer: tuple(sorted(ids)) for layer, ids in sorted(experts.items()) if ids}
    _check_experts(plan, chosen)
    check_files(plan, root)
    total = sum(len(ids) * _pieces(plan.layers[layer]) for layer, ids in chosen.items())
    own = _own_activations(plan, root, chosen)
    done = 0
    layers = {}
    with ExitStack() as stack, torch.no_grad():
        reader = _Reader(plan, root, stack)
        for layer, ids in chosen.items():
            layer_plan = plan.layers[layer]
            tensors = {}
            for name, recipe in layer_plan.parameters.items():
                target = torch.empty((len(ids), *recipe.shape), dtype=dtype, device=device)
                for row, expert in zip(target, ids, strict=True):
                    row.copy_(reader.assemble(recipe, expert))
                    done += len(recipe.sources)
                    if progress is not None:
                        progress(done, total)
                tensors[name] = target
            layers[layer] = LayerWeights(layer_plan.spec, ids, layer_plan.hidden, tensors, own.get(layer))
    return GroupWeights(layers)


class ProgressBar:
    """Reports a long load in the log: a bar once a second at most, and nothing for the first two seconds.

    what: opens every line, such as "experts-0: loading experts".
    """

    _WIDTH = 24

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic, after_s: float = 2.0) -> None:
        self._what = what
        self._clock = clock
        self._start = clock()
        self._next = self._start + after_s
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Count `done` of `total` tensors as loaded."""
        now = self._clock()
        finished = done >= total
        if now < self._next and not (finished and self._shown):
            return
        self._next = now + 1.0
        self._shown = True
        filled = self._WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (self._WIDTH - filled)
        logger.info("%s [%s] %d/%d tensors, %.0f s", self._what, bar, done, total, now - self._start)


class _Reader:
    """Opens each shard once and reads slices of it."""

    def __init__(self, plan: LoadPlan, root: Path, stack: ExitStack) -> None:
        self._plan = plan
        self._root = root
        self._stack = stack
        self._open: dict[int, Any] = {}

    def assemble(self, recipe: Recipe, expert: int) -> torch.Tensor:
        """One expert's parameter, [recipe.shape], in the dtype it is stored in."""
        pieces = list(self._pieces(recipe, expert))
        found = [tuple(piece.shape) for piece in pieces]
        try:
            for operation in recipe.operations:
                if operation.name == "transpose":
                    pieces = [piece.transpose(*operation.dims) for piece in pieces]
                else:
                    pieces = [torch.cat(pieces, dim=operation.dims[0])]
        except (RuntimeError, IndexError) as error:
            if "memory" in str(error):
                raise
            raise self._misshapen(recipe, expert, found) from None
        # A tensor that is too small would be spread over its place without a word.
        if tuple(pieces[0].shape) != tuple(recipe.shape):
            raise self._misshapen(recipe, expert, found)
        return pieces[0]

    def _misshapen(self, recipe: Recipe, expert: int, found: list[tuple[int, ...]]) -> CheckpointError:
        key, number = recipe.sources[0].locate(expert)
        shapes = " and ".join("x".join(map(str, shape)) for shape in found)
        return CheckpointError(
            f"the tensor {key} in {self._root / self._plan.files[number].name} gives expert {expert} {shapes} numbers; "
            f"the load plan makes {'x'.join(map(str, recipe.shape))} of them."
        )

    def _pieces(self, recipe: Recipe, expert: int) -> Iterator[torch.Tensor]:
        for source in recipe.sources:
            key, number = source.locate(expert)
            try:
                lazy = self._file(number).get_slice(key)
                piece: torch.Tensor = lazy[expert] if source.fused else lazy[:]
            except (SafetensorError, OSError, IndexError, ValueError) as error:
                name = self._plan.files[number].name
                raise CheckpointError(f"the tensor {key} cannot be read from {self._root / name}: {error}.") from None
            yield piece

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self._root / self._plan.files[number].name
            self._open[number] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        return self._open[number]


def _pieces(layer: LayerPlan) -> int:
    """Checkpoint tensors, or slices of them, behind one expert."""
    return sum(len(recipe.sources) for recipe in layer.parameters.values())


def _check_experts(plan: LoadPlan, chosen: Mapping[int, Sequence[int]]) -> None:
    for layer, ids in chosen.items():
        if layer not in plan.layers:
            raise PlacementError(f"layer {layer} has no experts; layers with experts: {sorted(plan.layers)}.")
        count = plan.layers[layer].num_experts
        if len(set(ids)) != len(ids) or not 0 <= ids[0] <= ids[-1] < count:
            raise PlacementError(f"the experts {list(ids)} of layer {layer} must be different and 0 to {count - 1}.")


def _own_activations(
    plan: LoadPlan, root: Path, layers: Mapping[int, Sequence[int]]
) -> dict[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Layer -> the model's own activation, for layers whose spec names a fallback; imports transformers only then."""
    needed = [layer for layer in layers if plan.layers[layer].spec.fallback]
    if not needed:
        return {}
    names = sorted({str(plan.layers[layer].spec.fallback) for layer in needed})
    logger.warning("no description of the activation in %s: importing transformers in this replica", ", ".join(names))
    support = importlib.import_module("cluster.model_support")
    model = support.build_on_meta(support.read_config(root))
    result = {}
    for layer in needed:
        module = model.get_submodule(plan.layers[layer].module)
        result[layer] = module._apply_gate if plan.layers[layer].spec.gated else module.act_fn
    return result

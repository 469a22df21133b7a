"""The shared expert of a MoE block, computed while the block's rows are away at the routed ones.

Most blocks hand one and the same memory first to their routed and then to their shared experts:

    h = self.experts(x, index, weight)      rows leave │ shared(x) here │ results arrive
    h = h + self.shared_experts(x)                       its result is only handed out

`SharedExpert` stands in front of the shared module's own `forward`. The first call, in the start-up check, shows
whether the block does that, by the bits it hands over; one that does otherwise (computes the shared expert first, or
changes the input) is left alone for good. Later a call with other memory than announced gets the normal call.
Knows no transport and no model class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


class SharedExpert:
    """One block's shared module, whose `forward` it replaces on the instance."""

    def __init__(self, module: nn.Module) -> None:
        self._forward = cast(Callable[..., Tensor], module.forward)
        self._announced: Tensor | None = None
        self._like: Tensor | None = None
        self._output: Tensor | None = None
        self._dims: int | None = None
        self._settled = False
        module.__dict__["forward"] = self._serve

    def announce(self, hidden: Tensor) -> Callable[[], None] | None:
        """The routed experts are about to run on `hidden` [T, H]. Returns what can be done meanwhile, if anything."""
        self._output = None
        if not self._settled:
            # A copy: the block may change its input in place before it calls the shared expert.
            self._announced, self._like = hidden, hidden.clone()
            return None
        if self._dims is None:
            return None
        self._announced = hidden if self._dims == hidden.dim() else hidden[None]
        return self._run

    def _run(self) -> None:
        if self._announced is not None:
            self._output = self._forward(self._announced)

    def _serve(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        announced, output = self._announced, self._output
        self._announced = self._output = None
        plain = not args and not kwargs
        if not self._settled:
            self._settled = True
            if plain and announced is not None and self._like is not None and _same_rows(hidden, announced, self._like):
                self._dims = hidden.dim()
            self._like = None
        elif plain and output is not None and announced is not None and _same_memory(hidden, announced):
            return output
        return self._forward(hidden, *args, **kwargs)


def bind_shared_experts(model: nn.Module) -> dict[int, SharedExpert]:
    """Stand in front of every shared expert of a model from `load_router_model`, by decoder layer.

    A block's shared expert is the one module beside the routed ones that is named so; its gate is none.
    """
    found = {}
    for block in model.modules():
        layers = [
            layer for child in block.children() if (layer := getattr(child, "expertscale_layer", None)) is not None
        ]
        shared = [child for name, child in block.named_children() if "shared" in name and "gate" not in name]
        if len(layers) == len(shared) == 1:
            found[cast(int, layers[0])] = SharedExpert(shared[0])
    return found


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _same_rows(hidden: Tensor, announced: Tensor, like: Tensor) -> bool:
    """Whether `hidden`, [T, H] or [1, T, H], lies where `announced` [T, H] lay and still says the same."""
    for view in (announced, announced[None]):
        if _same_memory(hidden, view):
            return torch.equal(hidden.view_as(like), like)
    return False

"""What an expert does between its two projections, as its `FfnSpec` describes it. Torch only.

`cluster.ffn_probe` finds the spec that reproduces a model's own code bit for bit; expert replicas run it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cluster.load_plan import FfnSpec

Function = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Activation functions a spec can name, besides "swish"."""


def activate(spec: FfnSpec, projected: torch.Tensor) -> torch.Tensor:
    """Gate and activate: [R, 2I] -> [R, I] where gated, else [R, I] -> [R, I]; same dtype.

    Raises:
        ValueError: the spec needs a class of transformers instead.
    """
    if spec.fallback is not None:
        raise ValueError(f"the activation of {spec.fallback} has no description; it must be called itself")
    function = _function(spec)
    if not spec.gated:
        return function(projected)
    gate, up = (projected[..., ::2], projected[..., 1::2]) if spec.interleaved else projected.chunk(2, dim=-1)
    if spec.upcast:
        gate, up = gate.float(), up.float()
    if spec.limit is not None:
        up = up.clamp(min=-spec.limit, max=spec.limit)
        gate = function(gate).clamp(max=spec.limit) if spec.limit_after else function(gate.clamp(max=spec.limit))
    else:
        gate = function(gate)
    if spec.up_offset:
        up = up + spec.up_offset
    return (gate * up).to(projected.dtype)


def _function(spec: FfnSpec) -> Function:
    if spec.activation != "swish":
        return FUNCTIONS[spec.activation]
    alpha = spec.alpha
    return lambda x: x * torch.sigmoid(x * alpha)

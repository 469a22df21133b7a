"""Descriptions of activations found by probing. About 6 s, 4 of them imports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster import ffn_probe
from cluster.activation import activate
from cluster.errors import UnsupportedModelError
from cluster.load_plan import FfnSpec
from tests import models


def experts_of(model: Any) -> Any:
    """The first experts module."""
    return next(module for module in model.modules() if hasattr(module, "_is_expert_parallel"))


def test_the_probe_describes_clamped_interleaved_swiglu() -> None:
    expected = FfnSpec(
        interleaved=True, transposed=True, bias=True, activation="swish", alpha=1.702, limit=7.0, up_offset=1.0
    )
    assert ffn_probe.derive_spec(experts_of(models.build("gpt_oss"))) == expected


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "gelu_pytorch_tanh", "relu2"])
def test_the_probe_finds_other_activations(name: str) -> None:
    module = experts_of(models.build("mixtral", hidden_act=name))
    spec = ffn_probe.derive_spec(module)
    assert spec.fallback is None
    x = torch.randn(3, 64)
    assert torch.equal(activate(spec, x), module._apply_gate(x))


GATES = {
    "clamped": lambda gate, up: torch.nn.functional.silu(gate.clamp(max=4.5)) * up.clamp(-4.5, 4.5),
    "clamped after": lambda gate, up: torch.nn.functional.silu(gate).clamp(max=4.5) * up.clamp(-4.5, 4.5),
    "upcast": lambda gate, up: (torch.nn.functional.silu(gate.float()) * up.float()).to(up.dtype),
    "sloped": lambda gate, up: gate * torch.sigmoid(gate * 1.25) * (up + 1),
}


@pytest.mark.parametrize("name", GATES)
def test_the_probe_describes_the_known_variants_of_a_gate(name: str) -> None:
    module = experts_of(models.build("mixtral"))
    module.limit, module.slope = 4.5, 1.25
    module._apply_gate = lambda x: GATES[name](*x.chunk(2, dim=-1))
    spec = ffn_probe.derive_spec(module)
    assert spec.fallback is None
    assert spec != FfnSpec()
    for dtype in (torch.float32, torch.bfloat16):
        x = (10 * torch.randn(16, 64)).to(dtype)
        assert torch.equal(activate(spec, x), module._apply_gate(x))


def test_experts_without_a_gate_are_described_too() -> None:
    module = experts_of(models.build("mixtral", hidden_act="relu2"))
    module.has_gate = False
    module.up_proj = module.gate_up_proj
    del module.gate_up_proj
    assert ffn_probe.derive_spec(module) == FfnSpec(gated=False, activation="relu_squared")


def test_an_activation_without_description_names_its_class() -> None:
    module = experts_of(models.build("mixtral"))
    module._apply_gate = lambda x: x.chunk(2, dim=-1)[0].sin()
    spec = ffn_probe.derive_spec(module)
    assert spec.fallback == "transformers.models.mixtral.modeling_mixtral:MixtralExperts"
    with pytest.raises(ValueError, match="must be called itself"):
        activate(spec, torch.zeros(1, 4))


def test_experts_with_other_parameters_are_refused() -> None:
    module = experts_of(models.build("mixtral"))
    module.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=r"MixtralExperts .*scale"):
        ffn_probe.derive_spec(module)

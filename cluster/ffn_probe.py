"""Find the `FfnSpec` of a transformers experts module by trying descriptions until one gives the same bits.

Classes override `_apply_gate` in their own ways (clamps, offsets, interleaving), so their code is the only truth: each
candidate description is compared with it on random inputs in float32 and bfloat16. Knows no model types.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cluster.activation import FUNCTIONS, activate
from cluster.errors import UnsupportedModelError
from cluster.load_plan import FfnSpec

_PROBE_SEED = 20
_PROBE_WIDTH = 64


def derive_spec(module: Any) -> FfnSpec:
    """The spec of one experts module that follows transformers' experts interface. The module may be on meta.

    Where no description reproduces the module's activation, the spec names the class as fallback.

    Raises:
        UnsupportedModelError: the module has parameters that the standard experts do not have.
    """
    spec = FfnSpec(gated=module.has_gate, transposed=module.is_transposed, bias=module.has_bias)
    names = {name for name, _ in module.named_parameters()}
    extra = names ^ set(spec.parameter_names)
    if extra or getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"the experts class {type(module).__name__} differs from the standard one in its parameters "
            f"({', '.join(sorted(extra)) or 'a norm after each expert'}); "
            f"supported are {', '.join(spec.parameter_names)}."
        )
    probes = _probes(module)
    expected = [_own_activation(module, spec, probe) for probe in probes]
    for candidate in _candidates(module, spec):
        if all(torch.equal(activate(candidate, x), y) for x, y in zip(probes, expected, strict=True)):
            return candidate
    return replace(spec, fallback=f"{type(module).__module__}:{type(module).__qualname__}")


def _own_activation(module: Any, spec: FfnSpec, probe: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module._apply_gate(probe) if spec.gated else module.act_fn(probe)
    return result


def _scalars(module: Any) -> list[float]:
    """Positive numbers the module keeps as plain attributes: its clamp limits and slopes are among them."""
    found = {
        float(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, float) and value > 0
    }
    return sorted(found)


def _probes(module: Any) -> list[torch.Tensor]:
    """Inputs that reach small values, large values and beyond every clamp, first in float32, then in bfloat16."""
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    scales = [1.0, 8.0, *(4 * number for number in _scalars(module))]
    rows = [scale * torch.randn(4, _PROBE_WIDTH, generator=generator) for scale in scales]
    probe = torch.cat(rows)
    return [probe, probe.bfloat16()]


def _candidates(module: Any, base: FfnSpec) -> Iterator[FfnSpec]:
    """Descriptions to try, simplest first."""
    scalars = _scalars(module)
    functions = [(name, 1.0) for name in FUNCTIONS] + [("swish", alpha) for alpha in scalars]
    if not base.gated:
        for name, alpha in functions:
            yield replace(base, activation=name, alpha=alpha)
        return
    limits = [(None, False), *itertools.product(scalars, (False, True))]
    choices = itertools.product((False, True), (0.0, 1.0), limits, (False, True), functions)
    for upcast, offset, (limit, after), interleaved, (name, alpha) in choices:
        yield replace(
            base,
            interleaved=interleaved,
            activation=name,
            alpha=alpha,
            limit=limit,
            limit_after=after,
            up_offset=offset,
            upcast=upcast,
        )

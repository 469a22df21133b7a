"""Substitutes: the same bits as the model's own norms and gates, and no substitute where that is not so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deployments.router.substitutes import substitute
from tests import models

ONE_GROUP = {"n_group": 1, "topk_group": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_gives_the_same_bits_with_substitutes(dtype: torch.dtype) -> None:
    model = models.build("deepseek_v3", dtype, **ONE_GROUP)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2)
    tokens = torch.randint(3, models.VOCABULARY, (1, 19))
    with torch.inference_mode():
        expected = model(tokens).logits
        replaced = substitute(model)
        assert torch.equal(model(tokens).logits, expected)
    if dtype == torch.float32:
        norms = sum("Norm" in type(module).__name__ for module in model.modules())
        assert replaced == norms + 1


def test_a_gate_with_groups_to_choose_from_keeps_its_own_code() -> None:
    model = models.build("deepseek_v3", n_group=2, topk_group=1)
    substitute(model)
    assert not [name for name, module in model.named_modules() if name.endswith("gate") and "forward" in vars(module)]


class ShiftedNorm(nn.Module):
    """Gemma's: the weight counts from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), 0.5))
        self.eps = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, (16,), self.weight + 1, self.eps)


def test_a_norm_that_computes_something_else_keeps_its_own_code() -> None:
    assert substitute(ShiftedNorm()) == 0
    assert substitute(nn.LayerNorm(16, bias=False)) == 0

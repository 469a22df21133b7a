"""Shortcuts change how a module is reached, and neither what it computes nor what can be asked of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deployments.router.shortcuts import shorten
from tests import models


def test_a_model_gives_the_same_bits_and_shows_the_same_parameters() -> None:
    model = models.build("qwen2_moe")
    tokens = torch.randint(3, models.VOCABULARY, (1, 9))
    names = [name for name, _ in model.named_parameters()]
    with torch.inference_mode():
        expected = model(tokens).logits
        shorten(model)
        assert torch.equal(model(tokens).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    attention = model.model.layers[0].self_attn
    assert attention.config.hidden_size == model.config.hidden_size
    assert isinstance(attention.q_proj, nn.Linear)
    assert attention.q_proj.weight is model.get_parameter("model.layers.0.self_attn.q_proj.weight")


def test_what_is_set_on_the_model_later_reaches_its_layers() -> None:
    model = models.build("mixtral")
    shorten(model)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


class Doubled(nn.Linear):
    def __call__(self, hidden: Tensor) -> Tensor:
        return 2 * super().__call__(hidden)


def test_modules_with_hooks_or_a_call_of_their_own_are_called_as_they_are() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooked = nn.Linear(4, 4)
            self.doubled = Doubled(4, 4)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.doubled(self.hooked(hidden))

    both, hidden = Both(), torch.ones(2, 4)
    both.hooked.register_forward_hook(lambda module, args, output: output + 1)  # noqa: ARG005
    expected = both(hidden)
    shorten(both)
    assert torch.equal(both(hidden), expected)

"""When a shared expert runs while rows are away, and when it must not: small blocks of every order of calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deployments.router.backbone import MoeSwitch
from deployments.router.shared_expert import bind_shared_experts

LAYER = 3


class Experts(nn.Module):
    expertscale_layer = LAYER

    def __init__(self, switch: MoeSwitch) -> None:
        super().__init__()
        self.switch = switch

    def forward(self, hidden: Tensor) -> Tensor:
        none = torch.zeros(hidden.shape[0], 1, dtype=torch.long)
        return self.switch(LAYER, hidden, none, none)


class Shared(nn.Linear):
    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden)


class Block(nn.Module):
    """`change` is what happens to the input between the routed and the shared experts."""

    def __init__(
        self, change: Callable[[Tensor], Tensor] = lambda hidden: hidden, *, shared_first: bool = False
    ) -> None:
        super().__init__()
        self.away: list[str] = []
        self.switch = MoeSwitch(self.moe)
        self.experts = Experts(self.switch)
        self.shared_experts = Shared(8, 8)
        self.shared_expert_gate = nn.Linear(8, 1)
        self.change = change
        self.shared_first = shared_first

    def moe(
        self, layer: int, hidden: Tensor, index: Tensor, weight: Tensor, meanwhile: Callable[[], None] | None = None
    ) -> Tensor:
        assert layer == LAYER
        assert index.shape == weight.shape
        before = self.shared_experts.calls
        if meanwhile is not None:
            meanwhile()
        self.away.append("shared" if self.shared_experts.calls > before else "idle")
        return hidden * 2

    def forward(self, hidden: Tensor) -> Tensor:
        if self.shared_first:
            first = self.shared_experts(hidden)
            return first + self.experts(hidden[0])[None]
        routed = self.experts(hidden.view(-1, hidden.shape[-1]))
        return routed.view_as(hidden) + self.shared_experts(self.change(hidden))


def run(block: Block, steps: int = 3) -> None:
    """Every step must give what the block gives alone, whatever the number of rows."""
    alone = Block(block.change, shared_first=block.shared_first)
    alone.load_state_dict(block.state_dict())
    block.switch.shared = bind_shared_experts(block)
    with torch.inference_mode():
        for step in range(steps):
            hidden = torch.randn(1, 2 + step, 8)
            assert torch.equal(block(hidden.clone()), alone(hidden.clone()))


def test_it_runs_while_rows_are_away_once_a_first_call_has_shown_that_it_may() -> None:
    block = Block()
    run(block)
    assert block.away == ["idle", "shared", "shared"]
    assert block.shared_experts.calls == 3


@pytest.mark.parametrize("change", [lambda hidden: hidden + 1, lambda hidden: hidden.add_(1), torch.clone])
def test_a_block_that_changes_the_input_first_gets_normal_calls(change: Callable[[Tensor], Tensor]) -> None:
    block = Block(change)
    run(block)
    assert block.away == ["idle"] * 3
    assert block.shared_experts.calls == 3


def test_a_shared_expert_that_comes_first_is_left_alone() -> None:
    block = Block(shared_first=True)
    run(block)
    assert block.away == ["idle"] * 3
    assert block.shared_experts.calls == 3


def test_other_memory_than_announced_gets_the_normal_call() -> None:
    block = Block()
    run(block)
    block.change = lambda hidden: hidden * 3
    hidden = torch.randn(1, 4, 8)
    with torch.inference_mode():
        expected = hidden * 2 + nn.functional.linear(hidden * 3, block.shared_experts.weight, block.shared_experts.bias)
        assert torch.equal(block(hidden), expected)


def test_a_moe_function_that_knows_no_meanwhile_is_called_without() -> None:
    block = Block()
    block.switch = block.experts.switch = MoeSwitch(lambda layer, hidden, index, weight: hidden * 2)  # noqa: ARG005
    run(block)
    assert block.shared_experts.calls == 3


def test_nothing_of_a_failed_layer_is_handed_out_later() -> None:
    block = Block()
    run(block)
    [shared] = block.switch.shared.values()
    old = torch.randn(2, 8)
    with torch.inference_mode():
        work = shared.announce(old)
        assert work is not None
        work()  # the rows never arrive, and the block is not called on
        hidden = torch.randn(1, 2, 8)
        assert torch.equal(block(hidden), hidden * 2 + nn.functional.linear(hidden, *block.shared_experts.parameters()))

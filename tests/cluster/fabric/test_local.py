"""Experts in the router's own process (under 1 s)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.errors import EngineError, ExpertsUnavailableError
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.local import LocalTransport
from cluster.membership import Epoch, View
from tests.cluster.fabric import small_experts as small


def local(view_groups: int = small.GROUPS) -> Dispatcher:
    groups = {f"experts-{group}": small.expert_group(group, torch.float32) for group in range(small.GROUPS)}
    view = View(Epoch("i", 1), tuple(small.replica(group, "") for group in range(view_groups)))
    return small.dispatcher(LocalTransport(groups), view)


def test_local_experts_give_what_a_loop_over_tokens_gives() -> None:
    hidden, index, weight = small.layer_input(5, torch.float32)
    output = local().scatter_gather(small.LAYER, hidden, index, weight)
    computes = [small.expert_group(group, torch.float32) for group in range(small.GROUPS)]
    for token in range(5):
        expected = torch.zeros(small.HIDDEN)
        for expert, share in zip(index[token].tolist(), weight[token], strict=True):
            group, place = divmod(expert, small.EXPERTS // small.GROUPS)
            counts = torch.zeros(small.EXPERTS // small.GROUPS, dtype=torch.int64)
            counts[place] = 1
            expected += computes[group](small.LAYER, counts, hidden[token : token + 1])[0] * share
        torch.testing.assert_close(output[token], expected)


def test_bytes_of_rows_are_counted_both_ways() -> None:
    dispatcher = local()
    dispatcher.scatter_gather(small.LAYER, *small.layer_input(5, torch.float32))
    assert dispatcher.stats().transport_bytes == {"local": 2 * 5 * small.PER_TOKEN * small.HIDDEN * 4}


def test_experts_that_raise_fail_the_step_and_not_the_process() -> None:
    def broken(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        raise ValueError(f"layer {layer}: {len(rows)} rows, {len(counts)} experts")

    transport = LocalTransport({"experts-0": broken, "experts-1": broken})
    dispatcher = small.dispatcher(transport, View(Epoch("i", 1), (small.replica(0, ""), small.replica(1, ""))))
    with pytest.raises(EngineError, match="ValueError: layer 1"):
        dispatcher.scatter_gather(small.LAYER, *small.layer_input(5, torch.float32))


def test_a_group_of_another_process_is_not_available_here() -> None:
    transport = LocalTransport({"experts-0": small.expert_group(0, torch.float32)})
    view = View(Epoch("i", 1), (small.replica(0, ""), small.replica(1, "")))
    dispatcher = Dispatcher(small.PLACEMENT, transport, wait_s=0.01, timeout_s=1)
    dispatcher.update(view)
    with pytest.raises(ExpertsUnavailableError, match=r"experts-1.*not in this process"):
        dispatcher.scatter_gather(small.LAYER, *small.layer_input(5, torch.float32))

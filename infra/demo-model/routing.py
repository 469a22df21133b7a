"""What the routers of a model do: recording their choices, and the loss that shapes them.

Dimension letters: T tokens, E experts, K experts per token, D domains, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

Record = tuple[Tensor, Tensor]  # router logits [T, E], chosen experts [T, K]


def moe_layers(model: DeepseekV3ForCausalLM) -> list[int]:
    """Indices of the layers that have a router."""
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


@contextmanager
def recorded_routing(model: DeepseekV3ForCausalLM) -> Iterator[list[Record]]:
    """A list that receives one record per MoE layer and forward pass, in layer order; the caller clears it."""
    records: list[Record] = []

    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        records.append((output[0], output[2]))

    handles = [model.model.layers[i].mlp.gate.register_forward_hook(record) for i in moe_layers(model)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def expert_shares(chosen: Tensor, experts: int) -> Tensor:
    """Share of the rows that each expert receives: [T, K] -> [E], sums to 1."""
    return torch.bincount(chosen.reshape(-1), minlength=experts).float() / chosen.numel()


def domain_balance_loss(record: Record, domain_of_token: Tensor, domains: int, within: float) -> Tensor:
    """Switch's balance loss, split by domain (Fedus et al. 2021, eq. 4: E * sum_e f_e * P_e).

    With f_d and P_d taken over the tokens of one domain, Switch's loss over D equal domains is the mean, over all pairs
    (d, d'), of E * f_d . P_d'. A pair of two domains measures how far they share experts and keeps weight 1; a pair of
    one domain with itself measures how far it concentrates and gets weight `within`. At 1 this is Switch's loss
    exactly; below 1 all experts are still used, but domains part.

    domain_of_token: int64 [T]. Even routing gives (D - 1 + within) / D.
    """
    logits, chosen = record
    experts = logits.shape[1]
    scores = logits.sigmoid()
    scores = scores / scores.sum(dim=1, keepdim=True)
    masks = [domain_of_token == d for d in range(domains)]
    f = torch.stack([expert_shares(chosen[mask], experts) for mask in masks])  # [D, E]
    p = torch.stack([scores[mask].mean(dim=0) for mask in masks])  # [D, E]
    weights = torch.ones(domains, domains) - (1 - within) * torch.eye(domains)
    return experts * (weights * (f @ p.T)).mean()

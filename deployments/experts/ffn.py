"""The feed-forward networks of one layer's experts, on rows sorted by expert. Torch only.

Same operators in the same order as `grouped_mm_experts_forward` of transformers 5.23 (integrations/moe.py), so rows are
bitwise those of the whole model, without its weighting and summing: those are the router's. Knows no routing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cluster.activation import activate
from deployments.experts.weights import LayerWeights

TILE_ROWS = 16
"""Rows of every matrix product in batch-invariant mode."""

Project = Callable[[str, torch.Tensor], torch.Tensor]
"""(parameter name, rows [R, in]) -> rows [R, out]."""


@torch.no_grad()
def expert_ffn(
    weights: LayerWeights, rows: torch.Tensor, counts: torch.Tensor, *, batch_invariant: bool = False
) -> torch.Tensor:
    """Run each expert on its rows.

    rows: [R, H], in order of local expert. counts: int64 [E_local], rows of each expert, R in all.
    batch_invariant: every product has 16 rows, padded with zeros, so that no row depends on how many others there are;
        needed for float32, whose kernels differ by row count (16-bit `grouped_mm` on the CPU is invariant as it is).
    Returns unweighted rows [R, H] in the order and dtype of `rows`, on its device; computed on that of the weights.

    Raises:
        ValueError: counts do not fit the experts or the rows.
    """
    sizes = counts.tolist()
    total = rows.shape[0]
    if counts.shape != (len(weights.expert_ids),) or sum(sizes) != total or min(sizes) < 0:
        raise ValueError(f"counts {sizes} do not cut {total} rows among {len(weights.expert_ids)} experts")
    if total == 0:
        return rows.new_empty(0, weights.hidden)
    x = rows.to(weights.device, weights.dtype)
    if not batch_invariant:
        # A decoding sequence names few experts: a group often computes for one of them.
        busiest = max(sizes)
        alone = busiest == total and x.device.type == "cpu"
        project = _single(weights, sizes.index(busiest)) if alone else _grouped(weights, counts.to(x.device))
        return _run(weights, x, project).to(rows)
    tiles = [expert for expert, size in enumerate(sizes) for _ in range(-(-size // TILE_ROWS))]
    place = _places(sizes, x.device)
    padded = x.new_zeros(len(tiles) * TILE_ROWS, x.shape[1]).index_copy_(0, place, x)
    return _run(weights, padded, _tiled(weights, tiles))[place].to(rows)


def _run(weights: LayerWeights, x: torch.Tensor, project: Project) -> torch.Tensor:
    up = project(weights.spec.up_name, x)
    own = weights.own_activation
    return project("down_proj", activate(weights.spec, up) if own is None else own(up))


def _single(weights: LayerWeights, expert: int) -> Project:
    """One product, for one expert that has all rows: on a CPU what `grouped_mm` does for it, without the search."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        result = torch.mm(x, _as_right_factor(weights, name)[expert])
        return result.add_(weights.tensors[f"{name}_bias"][expert]) if weights.spec.bias else result

    return project


def _grouped(weights: LayerWeights, counts: torch.Tensor) -> Project:
    """One grouped product for all experts."""
    offsets = counts.cumsum(0, dtype=torch.int32)
    owner = torch.repeat_interleave(counts) if weights.spec.bias else None

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        result = F.grouped_mm(x, _as_right_factor(weights, name), offs=offsets)
        return result if owner is None else result.add_(weights.tensors[f"{name}_bias"][owner])

    return project


def _tiled(weights: LayerWeights, tiles: list[int]) -> Project:
    """One product per tile of `TILE_ROWS` rows; tiles[i] is the local expert of tile i."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = _as_right_factor(weights, name)
        result = x.new_empty(x.shape[0], weight.shape[2])
        for number, expert in enumerate(tiles):
            tile = slice(number * TILE_ROWS, (number + 1) * TILE_ROWS)
            torch.mm(x[tile], weight[expert], out=result[tile])
        if weights.spec.bias:
            owner = torch.tensor(tiles, device=x.device).repeat_interleave(TILE_ROWS)
            result.add_(weights.tensors[f"{name}_bias"][owner])
        return result

    return project


def _as_right_factor(weights: LayerWeights, name: str) -> torch.Tensor:
    """The parameter as [E_local, in, out], a view."""
    weight = weights.tensors[name]
    return weight if weights.spec.transposed else weight.transpose(-2, -1)


def _places(sizes: list[int], device: torch.device) -> torch.Tensor:
    """Where each row lies once every expert's rows are padded to whole tiles: sizes [3, 1] -> [0, 1, 2, 16]."""
    starts, start = [], 0
    for size in sizes:
        starts.append(torch.arange(start, start + size))
        start += -(-size // TILE_ROWS) * TILE_ROWS
    return torch.cat(starts).to(device)

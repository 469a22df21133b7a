"""Multi-head latent attention over the compressed cache: absorbed for few queries, expanded for long chunks.

Letters: Q queries, L keys, h heads, r latent width, n and p the part of a head without and with rotary position,
v value width. The model's `kv_b_proj.weight` [h * (n + v), r] turns a latent c into k_nope = W_UK c and value = W_UV c.

    absorbed   (W_UK^T q) . c  and  W_UV (sum of weight x c):   Q h r (n + v)  +  Q L h (2 (r + p))
    expanded   k = W_UK c, value = W_UV c for all L keys:       L h r (n + v)  +  Q L h (2 (n + p))

multiply-adds each (the kernel takes keys and values of one width, hence the 2). The cheaper one is taken. DeepSeek-V3
(r 512, n 128, v 128, p 64) with L = 4096: absorbed up to Q = 163, so every decode row. From DeepSeek-V2
(arXiv 2405.04434, section 2.1). Knows no pages: it is handed latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UnsupportedModelError


@dataclass(frozen=True)
class LatentProjection:
    """What `kv_b_proj` of one layer does. up_key: [h, n, r]. up_value: [h, r, v] (a view). rope: width p."""

    weight: Tensor
    up_key: Tensor
    up_value: Tensor
    rope: int

    @property
    def rank(self) -> int:
        """Width r of a latent without its rotary key."""
        return self.up_key.shape[2]

    def absorb(self, query: Tensor) -> Tensor:
        """Queries [Q, h, n + p] -> queries against latents [Q, h, r + p]."""
        nope, rotary = query.split_with_sizes((self.up_key.shape[1], self.rope), -1)
        latent = torch.bmm(nope.transpose(0, 1), self.up_key)
        return torch.cat((latent.transpose(0, 1), rotary), dim=-1)

    def emit(self, latent: Tensor) -> Tensor:
        """Attended latents [Q, h, r + p] -> head outputs [Q, h, v]."""
        return torch.bmm(latent[..., : self.rank].transpose(0, 1), self.up_value).transpose(0, 1)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cached rows [1, L, 1, r + p] -> keys [1, L, h, n + p] and values [1, L, h, v]."""
        latent, rotary = torch.split(rows, [self.rank, self.rope], dim=-1)
        heads, nope = self.up_key.shape[:2]
        both = F.linear(latent[:, :, 0], self.weight).view(1, latent.shape[1], heads, -1)
        keys = torch.cat((both[..., :nope], rotary.expand(-1, -1, heads, -1)), dim=-1)
        return keys, both[..., nope:]

    def to_float(self) -> LatentProjection:
        """The same in float32."""
        weight, up_key = self.weight.float(), self.up_key
        split = weight.view(up_key.shape[0], -1, up_key.shape[2])
        nope = up_key.shape[1]
        return LatentProjection(weight, split[:, :nope], split[:, nope:].transpose(1, 2), self.rope)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form needs fewer multiply-adds for `queries` over `keys`."""
        _, nope, rank = self.up_key.shape
        project = rank * (nope + self.up_value.shape[2])
        pairs = 2 * queries * keys
        return queries * project + pairs * (rank + self.rope) <= keys * project + pairs * (nope + self.rope)


def bind_latent_layers(model: nn.Module) -> dict[int, LatentProjection]:
    """Find the layers that cache latents and make them hand those, unexpanded, to the attention function.

    A layer is one by its `expand_kv`, `kv_b_proj` and `layer_idx`, transformers' common shape of MLA. Returns the
    projections by layer index. The start-up check (probe.py) catches a layer that only looks the part.

    Raises:
        UnsupportedModelError: a projection that cannot be absorbed.
    """
    projections = {}
    for name, module in model.named_modules():
        if all(hasattr(module, part) for part in ("expand_kv", "kv_b_proj", "layer_idx")):
            projections[cast(int, module.layer_idx)] = _projection(name, module)
            # On the instance, in front of the class's method; the other way, transformers expands new rows for nothing.
            module.__dict__["expand_kv"] = _leave_compressed
    return projections


def _projection(name: str, module: nn.Module) -> LatentProjection:
    layer = module.kv_b_proj
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        raise UnsupportedModelError(f"{name}.kv_b_proj is no plain matrix, so latent attention cannot absorb it.")
    nope, value = cast(int, module.qk_nope_head_dim), cast(int, module.v_head_dim)
    weight = layer.weight.detach()
    split = weight.view(-1, nope + value, weight.shape[1])
    rope = cast(int, module.qk_rope_head_dim)
    return LatentProjection(weight, split[:, :nope], split[:, nope:].transpose(1, 2), rope)


def _leave_compressed(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rotary

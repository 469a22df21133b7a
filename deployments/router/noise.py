"""Sampling noise as a pure function of (seed, choice, position, token): the same on every router, in every batch.

A token is drawn as argmax over p[token] / e[token] with e exponential, which is the Gumbel-max trick without one of
its logarithms. Each e comes from SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based generator: its state is
a hash of (seed, choice, position) and its counter the token id, so any subset of a vocabulary can be evaluated alone.
Two batches whose probabilities differ a little therefore nearly always agree on the token, unlike with one uniform
number and a cumulative sum. Knows no logits and no sequences.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_BLOCK = 1 << 17  # elements drawn at once: 1 MB of float64 stays in the cache


def noise_key(seed: int, choice: int, position: int) -> int:
    """The 64-bit key, as a signed integer, of one drawn token. `position` 0 is the first token after the prompt."""
    digest = blake2b(f"{seed}/{choice}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise, mean 1, strictly positive, of int64 `keys` and token ids, broadcast together; float64."""
    # int64 arithmetic wraps, as the generator wants; only the shifts must be made logical by masking.
    z = tokens.add(1).mul(_GOLDEN).add(keys)
    z = _xorshift(z, 30).mul_(_MIX_1)
    z = _xorshift(z, 27).mul_(_MIX_2)
    z = _xorshift(z, 31)
    # 52 bits and a half are exact in float64: uniform on (0, 1) without its ends.
    uniform = (z >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_()


def draw(probabilities: Tensor, keys: Tensor) -> Tensor:
    """One token id per row, int64 [S], from `probabilities` [S, V] with the noise of `keys` int64 [S]."""
    tokens = torch.arange(probabilities.shape[1], device=probabilities.device)
    rows = max(1, _BLOCK // probabilities.shape[1])
    drawn = []
    for start in range(0, len(probabilities), rows):
        block = slice(start, start + rows)
        drawn.append((probabilities[block] / exponential(keys[block, None], tokens)).argmax(dim=-1))
    return torch.cat(drawn)


def draw_sparse(probabilities: Tensor, keys: Tensor) -> Tensor:
    """The same tokens as `draw`, evaluating noise only where a probability is not zero: for filtered rows."""
    rows, tokens = probabilities.nonzero(as_tuple=True)
    race = torch.zeros_like(probabilities, dtype=torch.float64)
    race[rows, tokens] = probabilities[rows, tokens] / exponential(keys[rows], tokens)
    return race.argmax(dim=-1)


def _xorshift(z: Tensor, bits: int) -> Tensor:
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))

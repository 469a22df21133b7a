"""The noise is what it says: a function of its key, uniform, independent, and right in distribution. About 2 s.

Seeds are fixed, so the statistical tests always give the same verdict; the bounds are far out (p around 1e-4).
"""

from __future__ import annotations

import math

import pytest
import torch

from deployments.router.noise import draw, draw_sparse, exponential, noise_key

MASK = (1 << 64) - 1


def split_mix_64(key: int, counter: int) -> float:
    """The reference, in Python's integers: exponential noise number `counter` of `key`."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return -math.log(((z >> 12) + 0.5) / (1 << 52))


def keys_of(*places: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor([noise_key(*place) for place in places])


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """(chi-square - degrees of freedom) / its standard deviation: about normal when the distribution is right."""
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_tensor_arithmetic_equals_the_reference_in_integers() -> None:
    keys = keys_of((0, 0, 0), (1, 2, 3), (-(1 << 63), 0, 7), ((1 << 80), 127, 10**6))
    noise = exponential(keys[:, None], torch.arange(50))
    for row, key in enumerate(keys.tolist()):
        assert noise[row].tolist() == pytest.approx([split_mix_64(key, token) for token in range(50)], rel=1e-13)


def test_keys_differ_in_seed_choice_and_position() -> None:
    places = [(s, c, p) for s in range(-3, 8) for c in range(4) for p in range(50)]
    assert len({noise_key(*place) for place in places}) == len(places)
    assert noise_key(5, 1, 9) == noise_key(5, 1, 9)


@pytest.mark.parametrize("axis", ["token", "position", "choice", "seed"])
def test_noise_is_uniform_along_every_axis(axis: str) -> None:
    count, bins = 40_000, 200
    if axis == "token":
        noise = exponential(keys_of((1, 0, 0)), torch.arange(count))
    else:
        place = {"position": lambda i: (1, 0, i), "choice": lambda i: (1, i, 0), "seed": lambda i: (i, 0, 0)}[axis]
        noise = exponential(keys_of(*(place(i) for i in range(count))), torch.tensor(3))
    uniform = (-noise).exp()
    counts = torch.histc(uniform, bins, 0, 1)
    assert abs(chi_square(counts, torch.full((bins,), count / bins))) < 4
    correlation = torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(count)


def test_noise_is_positive_and_finite_at_the_ends_of_the_range() -> None:
    noise = exponential(keys_of((2, 0, 0)), torch.arange(1_000_000))
    assert float(noise.min()) > 0
    assert math.isfinite(float(noise.max()))


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.softmax(torch.linspace(-3, 3, 50), dim=0)
    count = 40_000
    keys = keys_of(*((9, 0, position) for position in range(count)))
    counts = draw(probabilities.expand(count, 50), keys).bincount(minlength=50).double()
    assert abs(chi_square(counts, probabilities.double() * count)) < 4


def test_sparse_and_dense_draws_agree_and_never_take_an_impossible_token() -> None:
    scores = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 3
    kept = scores.masked_fill(scores < scores.topk(20).values[:, -1:], -torch.inf).softmax(-1)
    keys = keys_of(*((4, 0, position) for position in range(200)))
    drawn = draw(kept, keys)
    assert drawn.equal(draw_sparse(kept, keys))
    assert bool((kept.gather(1, drawn[:, None]) > 0).all())


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    wide = torch.randn(5, 100_000, generator=torch.Generator().manual_seed(1)).softmax(-1)
    keys = keys_of(*((4, choice, 0) for choice in range(5)))
    alone = [int(draw(wide[row : row + 1], keys[row : row + 1])) for row in range(5)]
    assert draw(wide, keys).tolist() == alone


def test_nearly_equal_probabilities_draw_the_same_token() -> None:
    scores = torch.randn(2000, 100, generator=torch.Generator().manual_seed(2))
    keys = keys_of(*((7, 0, position) for position in range(2000)))
    disturbed = scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(3)) * 1e-5
    assert draw(scores.softmax(-1), keys).equal(draw(disturbed.softmax(-1), keys))

"""What the growth side makes of times; nothing is timed."""

from __future__ import annotations

import pytest

from infra.bench.growth import _figures, marginal
from infra.bench.measure import Samples


def test_what_one_more_costs_is_taken_round_by_round() -> None:
    taken = {"2": Samples((1.0, 10.0)), "6": Samples((3.0, 11.0))}
    assert marginal(taken, "2", "6") == Samples((0.5, 0.25))


@pytest.mark.parametrize(("last_ms", "ratio"), [(13.0, 1.0), (17.0, 2.0), (11.0, 0.5)])
def test_an_axis_says_whether_it_bends_in_its_last_doubling(last_ms: float, ratio: float) -> None:
    """5 ms at nothing and 1 ms for each, but for the last doubling."""
    taken = {"1": Samples((6.0,)), "2": Samples((7.0,)), "4": Samples((9.0,)), "8": Samples((last_ms,))}
    bend = list(_figures("c", "sequences", taken))[-1]
    assert bend.what == "one more of sequences, from 4 to 8"
    assert bend.ratio == pytest.approx(ratio)
    assert bend.target is None


def test_two_sizes_have_no_bend() -> None:
    (figure,) = _figures("c", "sequences", {"1": Samples((6.0,)), "8": Samples((7.0,))})
    assert figure.what == "step at 8 sequences"

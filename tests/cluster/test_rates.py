"""Rates of totals; time is a number. Milliseconds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.rates import SETTLE_S, Rate


def test_totals_that_fall_begin_anew_once_all_who_counted_have_told_theirs_again() -> None:
    rate = Rate()
    for second, total in enumerate((1000, 1010, 0, 700, 700, 1050)):
        rate.take(float(second), np.array([total]))
        if second > 1:
            assert rate.per_s() is None, "what was counted long ago is no rate of now"
    rate.take(2.0 + SETTLE_S, np.array([1080]))
    rate.take(3.0 + SETTLE_S, np.array([1090]))
    assert rate.per_s() == pytest.approx([10.0])


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30))
def test_a_rate_lies_between_the_least_and_the_greatest_step_of_its_window(steps: list[int]) -> None:
    rate, total = Rate(), 0
    for second, step in enumerate(steps):
        total += step
        rate.take(float(second), np.array([total]))
    found = rate.per_s()
    assert found is not None
    last = steps[1:][-4:]
    assert min(last) - 1e-9 <= found[0] <= max(last) + 1e-9

"""Which numbers of threads the reference goes on with; nothing is decoded."""

from __future__ import annotations

from typing import Any

import pytest

from infra.bench.decode import Sides

NOTHING: Any = None


@pytest.mark.parametrize(
    ("one", "two", "expected"), [(10.0, 10.0, [1, 2]), (10.0, 14.9, [1, 2]), (10.0, 16.0, [2]), (16.0, 10.0, [1])]
)
def test_only_a_number_of_threads_that_was_far_slower_is_given_up(one: float, two: float, expected: list[int]) -> None:
    sides = Sides(NOTHING, NOTHING, NOTHING, alone={8: {1: one, 2: two}})
    assert sides.threads(8) == expected


def test_without_an_earlier_run_all_are_tried() -> None:
    assert Sides(NOTHING, NOTHING, NOTHING).threads(8) == [1, 2]

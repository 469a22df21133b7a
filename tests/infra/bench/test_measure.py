"""How samples are taken and summed up; no clock is asked."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from infra.bench.measure import Samples, alternate, cpu_s, percentile, pss_bytes


def test_the_median_is_the_middle_sample_whatever_the_order() -> None:
    assert Samples((9.0, 1.0, 2.0)).median == 2.0


def test_the_spread_is_the_distance_of_the_quartiles_by_the_median() -> None:
    assert Samples((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx((4 - 2) / 3)


def test_one_outlier_of_many_does_not_spread() -> None:
    assert Samples((2.0, 2.0, 2.0, 2.0, 100.0)).spread == 0.0


@pytest.mark.parametrize("values", [(3.0,), (0.0, 0.0)])
def test_where_there_is_nothing_to_compare_there_is_no_spread(values: tuple[float, ...]) -> None:
    assert Samples(values).spread == 0.0


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], float]:
        def measured() -> float:
            order.append(name)
            return float(len(order))

        return measured

    taken = alternate({"a": side("a"), "b": side("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert taken == {"a": Samples((3.0, 5.0)), "b": Samples((4.0, 6.0))}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 10.0), (0.5, 25.0), (0.95, 38.5), (1.0, 40.0)])
def test_a_percentile_lies_between_its_neighbours_by_proportion(share: float, expected: float) -> None:
    assert percentile([40.0, 10.0, 30.0, 20.0], share) == pytest.approx(expected)


def test_every_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([7.0], share) for share in (0.0, 0.5, 1.0)] == [7.0] * 3


def test_a_process_that_has_ended_has_used_no_processor() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert cpu_s([child]) == 0.0
    assert cpu_s([os.getpid(), child]) > 0.0


def test_memory_is_counted_in_bytes() -> None:
    assert pss_bytes(os.getpid()) > 1 << 20

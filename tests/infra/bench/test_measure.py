"""How samples are taken and summed up; no clock is asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from infra.bench.measure import Samples, alternate, cpu_s, percentile, pss_bytes, threads_cpu_s


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


def test_processor_time_is_that_of_all_threads_and_finer_than_a_tick() -> None:
    """Half a tick of the kernel's, spent in a thread that is not the main one and goes on to wait."""
    if not threads_cpu_s(os.getpid()):
        pytest.skip("this kernel keeps no statistics of its scheduler")
    spent, end = threading.Event(), threading.Event()

    def spend() -> None:
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        spent.set()
        end.wait()

    own_from_s = time.process_time()
    before_s = threads_cpu_s(os.getpid())
    thread = threading.Thread(target=spend)
    thread.start()
    spent.wait()
    time.sleep(0.02)  # until it waits: the kernel brings the sum up to date when a thread leaves the processor
    took_s = threads_cpu_s(os.getpid()) - before_s
    own_s = time.process_time() - own_from_s
    end.set()
    thread.join()
    # For the thread that reads, which runs, the sum may be a tick old.
    assert 0.005 <= took_s <= own_s + 0.01


def test_threads_that_ended_still_count() -> None:
    def spend() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    before = cpu_s([os.getpid()])
    thread = threading.Thread(target=spend)
    thread.start()
    thread.join()
    assert cpu_s([os.getpid()]) - before >= 0.1 - 3 * 0.01  # in ticks


def test_a_spread_is_positive_for_negative_medians_too() -> None:
    assert Samples((-1.0, -2.0, -3.0)).spread == pytest.approx(0.5)


def test_memory_is_counted_in_bytes() -> None:
    assert pss_bytes(os.getpid()) > 1 << 20

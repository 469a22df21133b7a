"""Choosing replicas and splitting rows: properties of the pure functions (about 2 s)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fabric.balance import SNAP_SHARE, Candidate, split

candidates = st.lists(
    st.builds(Candidate, st.floats(0, 1e6), st.floats(1e-3, 1e9)),
    min_size=1,
    max_size=6,
)
counts = st.lists(st.integers(0, 200), min_size=1, max_size=16).filter(any)


@settings(max_examples=400, deadline=None)
@given(candidates, counts, st.floats(0, 1), st.integers(0, 1000))
def test_every_row_is_in_exactly_one_share(replicas: list[Candidate], rows: list[int], hop_s: float, turn: int) -> None:
    shares = split(replicas, rows, hop_s, turn)
    assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
    assert shares[-1].stop == sum(rows)
    assert all(share.stop > share.start for share in shares)
    assert len({share.candidate for share in shares}) == len(shares)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(1, 1000), min_size=1, max_size=6), counts, st.integers(0, 1000))
def test_idle_replicas_share_rows_in_proportion_to_speed(speeds: list[float], rows: list[int], turn: int) -> None:
    total = sum(rows)
    shares = split([Candidate(0, speed) for speed in speeds], rows, 0.0, turn)
    given_rows = Counter({share.candidate: share.stop - share.start for share in shares})
    for index, speed in enumerate(speeds):
        ideal = total * speed / sum(speeds)
        # One row by rounding, and what a cut at either end may move to meet the end of an expert.
        assert abs(given_rows[index] - ideal) <= 1 + 2 * SNAP_SHARE * (ideal + 1)


@settings(max_examples=200, deadline=None)
def chosen_for(replicas: list[Candidate], rows: int, turn: int) -> int:
    """The replica that gets rows which are not worth splitting, because the way there takes for ever."""
    (share,) = split(replicas, [rows], 1e9, turn)
    assert (share.start, share.stop) == (0, rows)
    return share.candidate


@given(candidates, st.integers(1, 10_000), st.integers(0, 100))
def test_the_chosen_replica_is_expected_to_finish_first(replicas: list[Candidate], rows: int, turn: int) -> None:
    finish = [(replica.load_rows + rows) / replica.speed_rows_per_s for replica in replicas]
    assert finish[chosen_for(replicas, rows, turn)] == min(finish)


def test_equal_replicas_are_chosen_equally_often() -> None:
    chosen = Counter(chosen_for([Candidate(0, 100)] * 3, 5, turn) for turn in range(300))
    assert chosen == {0: 100, 1: 100, 2: 100}


def test_a_row_too_many_goes_to_each_replica_in_turn() -> None:
    sizes = [split([Candidate(0, 100)] * 2, [1, 1, 1], 0.0, turn) for turn in range(4)]
    assert [[share.stop - share.start for share in shares] for shares in sizes] == [[2, 1], [1, 2], [2, 1], [1, 2]]


def test_two_hops_of_work_stay_with_one_replica_and_more_are_split() -> None:
    replicas = [Candidate(0, 1000), Candidate(0, 1000)]
    assert len(split(replicas, [10, 10], hop_s=0.01, turn=0)) == 1
    assert len(split(replicas, [11, 10], hop_s=0.01, turn=0)) == 2


def test_no_more_replicas_take_part_than_there_are_hops_of_work() -> None:
    replicas = [Candidate(0, 1000)] * 8
    assert len(split(replicas, [31], hop_s=0.01, turn=0)) == 3
    assert len(split(replicas, [500], hop_s=0.01, turn=0)) == 8


def test_a_busy_replica_gets_less_and_an_overloaded_one_nothing() -> None:
    assert [share.stop for share in split([Candidate(20, 1), Candidate(0, 1)], [1] * 100, 0.0, 0)] == [40, 100]
    (share,) = split([Candidate(1000, 1), Candidate(0, 1)], [1] * 100, 0.0, 0)
    assert (share.candidate, share.stop) == (1, 100)


def test_a_cut_moves_to_the_end_of_an_expert_close_by_and_no_further() -> None:
    replicas = [Candidate(0, 1), Candidate(0, 1)]
    assert [share.stop for share in split(replicas, [52, 48], 0.0, 0)] == [52, 100]
    assert [share.stop for share in split(replicas, [70, 30], 0.0, 0)] == [50, 100]


@pytest.mark.parametrize("turn", range(3))
def test_the_same_replica_keeps_the_same_experts_from_turn_to_turn(turn: int) -> None:
    shares = split([Candidate(0, 1)] * 3, [10, 10, 10], 0.0, turn)
    assert [(share.candidate, share.start, share.stop) for share in shares] == [(0, 0, 10), (1, 10, 20), (2, 20, 30)]


def test_a_hop_too_short_to_measure_splits_over_everybody() -> None:
    shares = split([Candidate(0, 1e-3), Candidate(0, 1e-3)], [200], 5e-324, 0)
    assert {share.candidate for share in shares} == {0, 1}

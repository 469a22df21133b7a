"""Messages per second shared by the streams of a router."""

from __future__ import annotations

import pytest

from deployments.router.pace import LONGEST_S, SHORTEST_S, Pace


def pace_of(streams: int) -> Pace:
    pace = Pace(chunks_per_s=100)
    for _ in range(streams):
        pace.enter()
    return pace


@pytest.mark.parametrize(("streams", "interval_s"), [(0, SHORTEST_S), (1, SHORTEST_S), (10, 0.1), (10_000, LONGEST_S)])
def test_the_interval_grows_with_the_streams_between_its_bounds(streams: int, interval_s: float) -> None:
    assert pace_of(streams).interval_s == interval_s


def test_streams_that_end_make_room_for_the_others() -> None:
    pace = pace_of(20)
    for _ in range(15):
        pace.leave()
    assert pace.interval_s == 0.05

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.forecast import MOST, Forecaster, Trend
from autoscale.spec import ForecastSpec

SPEC = ForecastSpec(horizon_s=15, level_tau_s=2, trend_tau_s=10)
WINDOW_S = 5.0


def follow(values: list[tuple[float, float]], spec: ForecastSpec = SPEC) -> tuple[Trend, float]:
    """(seconds, value) ... -> the trend, and the expected rise."""
    trend = None
    forecaster = Forecaster(spec, WINDOW_S, 0.0)
    for at, value in values:
        forecaster = Forecaster(spec, WINDOW_S, at)
        trend = forecaster.follow(trend, value)
    assert trend is not None
    return trend, forecaster.rise(trend)


def test_the_first_value_is_the_level_and_nothing_is_expected() -> None:
    trend, rise = follow([(7.0, 100.0)])
    assert (trend.level, rise) == (100.0, 0.0)


def test_the_worked_example_of_the_docstring() -> None:
    trend = Trend(level=100.0, slope=2.0, at=0.0, mark=100.0, marked_at=0.0, rises=99)
    assert 100 + Forecaster(SPEC, WINDOW_S, 0.0).rise(trend) == pytest.approx(121.1, abs=0.05)


def test_a_steady_load_is_its_own_forecast() -> None:
    trend, rise = follow([(t / 5, 50.0) for t in range(500)])
    assert trend.level == pytest.approx(50.0)
    assert rise == 0.0


def test_a_ramp_is_foreseen_once_it_has_risen_in_enough_windows() -> None:
    ramp = [(t / 5, 100 + 2 * t / 5) for t in range(300)]
    early, late = follow(ramp[: int(5 * WINDOW_S * 2)]), follow(ramp)
    assert early[1] == 0.0
    assert late[0].slope == pytest.approx(2.0, rel=0.1)
    assert late[1] == pytest.approx(2.0 * 20 * (1 - math.exp(-0.75)), rel=0.1)


def test_irregular_intervals_give_the_same_forecast_of_a_ramp() -> None:
    times, at, gap = [], 0.0, 0
    while at < 60:
        times.append(at)
        at += (0.1, 0.2, 0.7)[gap % 3]
        gap += 1
    even = follow([(t / 5, 100 + t / 5) for t in range(300)])
    odd = follow([(t, 100 + t) for t in times])
    assert odd[0].level == pytest.approx(even[0].level, rel=0.02)
    assert odd[1] == pytest.approx(even[1], rel=0.1)


@pytest.mark.parametrize("offset_s", [0.0, 1.0, 2.5, 4.0])
def test_a_step_smeared_over_the_window_is_no_trend_and_is_not_overshot(offset_s: float) -> None:
    trend, highest = None, 0.0
    for tick in range(400):
        now = tick / 5
        forecaster = Forecaster(SPEC, WINDOW_S, now)
        value = 100 + 100 * min(1.0, max(0.0, (now - 20 - offset_s) / WINDOW_S))
        trend = forecaster.follow(trend, value)
        highest = max(highest, trend.level + forecaster.rise(trend))
    assert highest <= 200 * 1.001


@pytest.mark.parametrize("before", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("window_s", "level_tau_s"), [(4, 2), (5, 2), (1, 2), (2, 2), (10, 2), (5, 5), (3, 0.5)])
def test_no_step_is_overshot_whatever_the_window_after_both_smoothings(
    window_s: float, level_tau_s: float, before: float
) -> None:
    """As `measure` does it: the mean over the window is smoothed and then followed. Marks fall anywhere in the step."""
    spec = ForecastSpec(level_tau_s=level_tau_s)
    for sixteenth in range(16):
        begins, smoothed, at = 30 + window_s * sixteenth / 16, before, 0.0
        trend, highest = None, 0.0
        for tick in range(int((40 + 5 * window_s + 20 * level_tau_s) * 5)):
            now = tick / 5
            forecaster = Forecaster(spec, window_s, now)
            value = before + (12 - before) * min(1.0, max(0.0, (now - begins) / window_s))
            smoothed += forecaster.weights(at)[0] * (value - smoothed)
            trend, at = forecaster.follow(trend, smoothed), now
            highest = max(highest, smoothed + forecaster.rise(trend))
        assert highest <= 12 * 1.001


def test_a_fall_is_not_extrapolated() -> None:
    assert follow([(t / 5, 1000 - t) for t in range(500)])[1] == 0.0


def test_method_none_takes_the_load_as_it_is() -> None:
    trend, rise = follow([(t / 5, 100.0 + t) for t in range(300)], ForecastSpec(method="none"))
    assert (trend.level, rise) == (399.0, 0.0)


def test_a_clock_that_jumps_back_leaves_the_level_and_no_trend() -> None:
    ramp = [(t / 5, 100 + t) for t in range(300)]
    trend, rise = follow([*ramp, (-50.0, 500.0)])
    assert trend.at == -50.0
    assert trend.level == pytest.approx(399, rel=0.05)
    assert (trend.slope, rise) == (0.0, 0.0)


@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.floats(0, 1e15)), min_size=1, max_size=30))
def test_whatever_comes_the_forecast_is_a_number_between_the_level_and_its_double(
    values: list[tuple[float, float]],
) -> None:
    trend, rise = follow(values)
    assert 0 <= trend.level <= 1e16
    assert 0 <= rise <= (MOST - 1) * trend.level
    assert math.isfinite(trend.slope)

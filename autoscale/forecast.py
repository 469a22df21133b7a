"""What a load will be one replica start from now: Holt's method with a damped trend, for irregular intervals. Pure.

Level and trend are smoothed as Holt does (C. C. Holt, "Forecasting seasonals and trends by exponentially weighted
moving averages", ONR Memorandum 52, 1957); the weights of a step of `dt` seconds are 1 - exp(-dt / tau), the
time-constant form for irregular intervals (D. J. Wright, "Forecasting data published at irregular time intervals using
an extension of Holt's method", Management Science 32(4), 1986); the trend fades on its way (E. S. Gardner and
E. McKenzie, "Forecasting trends in time series", Management Science 31(10), 1985), by a time constant of its own.

    forecast(h) = level + slope x D x (1 - exp(-h / D))         with D = 2 x trend_tau_s
    worked: level 100, slope 2 per s, trend_tau_s 10, h 15: 100 + 2 x 20 x (1 - exp(-0.75)) = 121.1

One thing is added. Rates are averages over a window, so a *step* of the load looks like a trend while the window passes
over it, and extrapolating it would ask for replicas that nobody needs. A trend counts only once the load has risen in
more windows in a row than a step makes it rise; until then the level is a plain exponential average, and the forecast
is the level. A step is seen rising in up to 3 + 4 x level_tau_s / window_s windows: in one or two while the window
passes over it, and then until what the two smoothings (here and in `measure`) have left of it is below `RISE`.

    worked: window_s 4, level_tau_s 2: up to 5 windows; a trend counts from the sixth on, after 24 s
"""

from __future__ import annotations

import math
from typing import NamedTuple

from autoscale.spec import ForecastSpec

RISE = 0.02
"""By how much of itself a load must rise in a window to count as rising."""
MOST = 2.0
"""A forecast is at most so many times the level."""


class Trend(NamedTuple):
    """level: of the load, smoothed. slope: its change per second. at: when. rises: windows in a row with a rise."""

    level: float
    slope: float
    at: float
    mark: float
    marked_at: float
    rises: int


class Forecaster:
    """Follows loads with the time constants of one policy. All times are those of one clock; `now` is the last one."""

    def __init__(self, spec: ForecastSpec, window_s: float, now: float) -> None:
        self._spec = spec
        self._window_s = window_s
        self._now = now
        self._damping_s = 2 * spec.trend_tau_s
        self._seasoned = 4 + math.ceil(4 * spec.level_tau_s / window_s)
        self._reach_s = self._damping_s * -math.expm1(-spec.horizon_s / self._damping_s)
        self._weights: dict[float, tuple[float, float]] = {}

    def weights(self, at: float) -> tuple[float, float]:
        """(level's, trend's) weight of a value now, when the last one was seen at `at`; 0 where no time has passed."""
        found = self._weights.get(at)
        if found is None:
            dt = max(0.0, self._now - at)
            level = 1.0 if self._spec.method == "none" else -math.expm1(-dt / self._spec.level_tau_s)
            found = self._weights[at] = (level, -math.expm1(-dt / self._spec.trend_tau_s))
        return found

    def follow(self, last: Trend | None, value: float) -> Trend:
        """`last` with one more value, finite and not negative. A clock that jumped back leaves the level only."""
        now = self._now
        if last is None:
            return Trend(value, 0.0, now, value, now, 0)
        level, slope, at, mark, marked_at, rises = last
        dt = now - at
        if dt <= 0:
            return last if dt == 0 else Trend(level, 0.0, now, level, now, 0)
        weight, trend_weight = self.weights(at)
        expected = level + slope * min(dt, self._reach_s) if rises >= self._seasoned else level
        new = max(0.0, expected + weight * (value - expected))
        slope += trend_weight * ((new - level) / dt - slope)
        if now - marked_at >= self._window_s:
            rises = min(self._seasoned, rises + 1) if new > mark * (1 + RISE) else 0
            mark, marked_at = new, now
        return Trend(new, slope, now, mark, marked_at, rises)

    def rise(self, trend: Trend) -> float:
        """How much more than now the load is expected to be at the horizon; never negative."""
        if self._spec.method == "none" or trend.rises < self._seasoned or trend.slope <= 0:
            return 0.0
        return min(trend.slope * self._reach_s, (MOST - 1) * trend.level)

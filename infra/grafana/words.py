"""What boards are made of, and how queries are put together from the metrics of `cluster.metrics`. Knows no Grafana."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.metrics import Metric

APPLICATION = 'application=~"$application"'
INTERVAL = "$__rate_interval"


@dataclass(frozen=True)
class Query:
    """legend: a template of labels."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """unit: one of Grafana's names. kind: lines over time, single numbers, or a table of layers by experts."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "numbers", "matrix"] = "lines"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """name: of its file, and the end of its uid."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]


def of(metric: Metric, suffix: str = "", *matchers: str) -> str:
    """The metric's series of the chosen applications."""
    return f"ray_{metric.name}{suffix}{{{', '.join([APPLICATION, *matchers])}}}"


def rate(metric: Metric, by: str = "", suffix: str = "", how: str = "sum") -> str:
    """What a counter rises a second, put together over all but `by`."""
    return f"{how}{_by(by)} (rate({of(metric, suffix)}[{INTERVAL}]))"


def rise(metric: Metric, by: str = "") -> str:
    """What a counter has risen by since the point before."""
    return f"sum{_by(by)} (increase({of(metric)}[{INTERVAL}]))"


def level(metric: Metric, by: str = "", how: str = "sum", *matchers: str) -> str:
    """A gauge, put together over all but `by`."""
    return f"{how}{_by(by)} ({of(metric, '', *matchers)})"


def mean(total: Metric, count: Metric, by: str = "") -> str:
    """What each one of `count` had of `total`, of late."""
    return f"{rate(total, by)} / ({rate(count, by)} > 0)"


def quantiles(metric: Metric, *shares: float) -> tuple[Query, ...]:
    """Percentiles of a histogram, over all replicas."""
    by_bucket = rate(metric, "le", "_bucket")
    return tuple(Query(f"histogram_quantile({share:g}, {by_bucket})", f"p{100 * share:g}") for share in shares)


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""

"""`Instruments` that remembers what was published and refuses what Ray would refuse, or Prometheus would not like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from cluster.metering import Meter
from cluster.metrics import METRICS, Metric

RESERVED = {"deployment", "replica", "application", "route"}
"""Serve's own labels."""

Labels = tuple[tuple[str, str], ...]


class Recorder:
    """values: (name, sorted labels) -> where a counter or gauge stands. observed: the same -> a histogram's values.

    set_again: how often each gauge was set, since those that are not set again end.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], float] = {}
        self.observed: dict[tuple[str, Labels], list[float]] = defaultdict(list)
        self.set_again: dict[tuple[str, Labels], int] = defaultdict(int)

    @property
    def meter(self) -> Meter:
        """A new meter that publishes here."""
        return Meter(self)

    @property
    def names(self) -> set[str]:
        """Everything that was published, without labels."""
        return {name for name, _ in [*self.values, *self.observed]}

    def of(self, metric: Metric, **labels: str) -> float:
        """Where a series stands. Raises KeyError if it never began."""
        return self.values[_key(metric, labels)]

    def seen(self, metric: Metric, **labels: str) -> list[float]:
        """A histogram's values, in the order they came."""
        return self.observed.get(_key(metric, labels), [])

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        _check(metric, "counter", value, labels)
        if value <= 0:
            raise ValueError(f"{metric.name} cannot rise by {value}")
        key = _key(metric, labels)
        self.values[key] = self.values.get(key, 0.0) + value

    def begin(self, metric: Metric, labels: Mapping[str, str]) -> None:
        _check(metric, "counter", 0.0, labels)
        self.values.setdefault(_key(metric, labels), 0.0)

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        _check(metric, "gauge", value, labels)
        self.values[_key(metric, labels)] = value
        self.set_again[_key(metric, labels)] += 1

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        _check(metric, "histogram", value, labels)
        self.observed[_key(metric, labels)].append(value)


def _key(metric: Metric, labels: Mapping[str, str]) -> tuple[str, Labels]:
    return metric.name, tuple(sorted(labels.items()))


def _check(metric: Metric, kind: str, value: float, labels: Mapping[str, str]) -> None:
    if metric not in METRICS:
        raise ValueError(f"{metric.name} is not declared in cluster.metrics")
    if metric.kind != kind:
        raise TypeError(f"{metric.name} is a {metric.kind}, not a {kind}")
    if type(value) not in (int, float):
        raise TypeError(f"{metric.name} takes int or float, not {type(value).__name__}")
    if set(labels) != set(metric.labels) or RESERVED & set(labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(labels)}")
    if not all(isinstance(each, str) and each for each in labels.values()):
        raise TypeError(f"{metric.name} takes labels with text, not {dict(labels)}")

"""Numbers to Ray's Prometheus endpoint and dashboard, through `ray.serve.metrics`.

The one file of this package that knows Serve: data path and control path both publish, in replicas and in Serve's
controller, and neither may import the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve import metrics

from cluster.metrics import Metric


class RayInstruments:
    """`Instruments` of Ray, each made when first used: a metric nobody counts is not exported."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).inc(value, dict(labels))

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).set(value, dict(labels))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).observe(value, dict(labels))

    def _instrument(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            about = {"description": metric.meaning, "tag_keys": metric.labels}
            if metric.kind == "histogram":
                made = metrics.Histogram(metric.name, boundaries=list(metric.buckets), **about)
            else:
                made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, **about)
            self._made[metric.name] = made
        return made

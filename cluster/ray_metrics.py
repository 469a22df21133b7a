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
    """`Instruments` of Ray, each made when first used: a metric nobody counts is not exported.

    own: labels of every series, for a process that is no replica: in one Serve adds its own labels by itself.
    """

    def __init__(self, own: Mapping[str, str] | None = None) -> None:
        self._own = dict(own or {})
        self._made: dict[str, Any] = {}

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).inc(value, {**self._own, **labels})

    def begin(self, metric: Metric, labels: Mapping[str, str]) -> None:
        # What `inc` calls once it has refused a 0. Private, as the pinned version has it; an e2e test sees the 0.
        self._instrument(metric)._record(0.0, {**self._own, **labels})

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).set(value, {**self._own, **labels})

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._instrument(metric).observe(value, {**self._own, **labels})

    def _instrument(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            about = {"description": metric.meaning, "tag_keys": (*self._own, *metric.labels)}
            if metric.kind == "histogram":
                made = metrics.Histogram(metric.name, boundaries=list(metric.buckets), **about)
            else:
                made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, **about)
            self._made[metric.name] = made
        return made

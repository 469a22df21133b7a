"""infra/prometheus/METRICS.md as text: what `cluster.metrics` declares, how it gets out, and how many series it is.

Pure. Knows no Ray; what it says of Ray's endpoint is what the pinned version does (tests/e2e/test_metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from cluster.errors import error_codes
from cluster.membership import State
from cluster.metrics import (
    EXPERT_ROWS_PER_S,
    FINISHED_CHOICES,
    MOST_OBSERVED,
    Metric,
    Section,
    sections,
)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
OUTCOMES = ("ok", "error", "client_gone")
FINISH_REASONS = ("stop", "length")
MOST_REASONS = 16
"""Kinds of reasons, of decisions and of a degraded state: fixed lists, shorter than this."""
MOST_EXPERT_SERIES = 600


@dataclass(frozen=True)
class Shape:
    """A cluster to count series of. replicas: of experts, all groups together; pools: each group's, at most."""

    name: str
    layers: int
    experts: int
    groups: int
    pools: int
    ingresses: int
    routers: int
    replicas: int

    def processes(self, section: Section) -> int:
        """How many publish that section."""
        of = {"Ingress replica": self.ingresses, "Router replica": self.routers, "expert replica": self.replicas}
        return of.get(section.by, 1)


SHAPES = (
    Shape("the demo", layers=4, experts=16, groups=4, pools=1, ingresses=1, routers=1, replicas=4),
    Shape("61 x 256", layers=61, experts=256, groups=32, pools=2, ingresses=2, routers=8, replicas=64),
)

_LABELS: dict[str, tuple[str, Callable[[Shape], int]]] = {
    "endpoint": (" or ".join(f"`{each}`" for each in ENDPOINTS), lambda _: len(ENDPOINTS)),
    "outcome": (
        "`ok`: all of the answer was handed over; `error`; `client_gone`: the client went away, or did not read",
        lambda _: len(OUTCOMES),
    ),
    "code": (
        "the error's class in cluster/errors.py, or `unforeseen`: " + ", ".join(f"`{each}`" for each in error_codes()),
        lambda _: len(error_codes()),
    ),
    "reason": (
        f"of choices {' or '.join(f'`{each}`' for each in FINISH_REASONS)}; else one of a fixed list of "
        "kinds, not a sentence",
        lambda _: MOST_REASONS,
    ),
    "group": (
        "an expert group, `experts-0` and on; where routers are scaled or counted too, `Router`",
        lambda s: s.groups + 1,
    ),
    "pool": ("where replicas run, `default` unless `experts.pools` names others", lambda s: s.pools),
    "transport": ("`stream`, `object_store` or `local`", lambda _: 2),
    "state": (", ".join(f"`{state.value}`" for state in State), lambda _: len(State)),
    "part": (
        "an expert group, or the routers: `router` in start_failures, `Router` in signal_age",
        lambda s: s.groups + 1,
    ),
    "layer": ("the model's own number of the layer", lambda s: s.layers),
    "expert": ("the expert's id in its layer, or `other`", lambda s: s.experts + 1),
    "direction": ("`up` or `down`", lambda _: 2),
}


def series(metric: Metric, section: Section, shape: Shape) -> int:
    """The most series of `metric` that one process has at a time; a histogram has one for each bucket and two more."""
    own = section.by == "expert replica"  # it is of one group, in one pool
    values = [1 if own else _LABELS[label][1](shape) for label in metric.labels]
    if metric is FINISHED_CHOICES:
        values = [len(FINISH_REASONS)]
    most = prod(values) * (len(metric.buckets) + 3 if metric.kind == "histogram" else 1)
    return min(most, MOST_EXPERT_SERIES) if metric is EXPERT_ROWS_PER_S else most


def page() -> str:
    """The whole file."""
    parts = [_HEAD]
    for section, metrics in sections().items():
        who = ("each " if section.by.endswith("replica") else "the ") + section.by
        parts.append(f"## {section.title}\n\nPublished by {who}.\n")
        rows = [(f"`ray_{m.name}`", m.kind, ", ".join(m.labels), m.meaning) for m in metrics]
        parts.append(_table(("name", "kind", "labels", "meaning"), rows))
    parts.append("## Labels\n")
    parts.append(_table(("label", "values"), [(f"`{label}`", text) for label, (text, _) in _LABELS.items()]))
    parts.append(_RAY_LABELS)
    parts.append(_cardinality())
    return "\n".join(parts)


def _cardinality() -> str:
    rows = []
    sums = [0] * len(SHAPES)
    for section, metrics in sections().items():
        cells = []
        for number, shape in enumerate(SHAPES):
            each, processes = sum(series(m, section, shape) for m in metrics), shape.processes(section)
            sums[number] += each * processes
            cells.append(f"{processes} x {each:,} = {each * processes:,}")
        rows.append((section.title, *cells))
    rows.append(("all", *(f"{total:,}" for total in sums)))
    demo, large = SHAPES
    about = (
        f"Demo: {demo.groups} groups of {demo.layers} layers x {demo.experts} experts, one replica of everything.\n"
        f"61 x 256: {large.layers} layers of {large.experts} experts in {large.groups} groups, {large.pools} pools, "
        f"{large.ingresses} Ingress replicas, {large.routers} routers,\n{large.replicas} expert replicas. "
        "Upper bounds, as if every error had come from every endpoint."
    )
    table = _table(("section", *(shape.name for shape in SHAPES)), rows)
    return f"## How many series\n\n{about}\n\n{table}\n{_BOUNDS.format(everything=large.layers * large.experts)}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


_HEAD = f"""# Metrics

Made by `make metrics` from cluster/metrics.py; do not edit.

Every process counts for itself and tells Ray once a second, through `ray.serve.metrics`; the Ray agent of each node
collects that every 10 s (`RAY_metrics_report_interval_ms`, in the environment of everything Ray starts) and serves it.

**Where to scrape.** Each node listens on a metrics port, a free one unless `ray start --metrics-export-port=8080` fixes
it; KubeRay opens 8080 under the name `metrics`. The head writes a file for Prometheus's `file_sd_configs` with the
ports of all nodes, new every few seconds: `/tmp/ray/prom_metrics_service_discovery.json`. A look by hand:

```
grep -oE '[0-9.]+:[0-9]+' /tmp/ray/prom_metrics_service_discovery.json |
    while read -r target; do curl -s "http://$target/metrics"; done | grep ray_expertscale
```

**What to know.** A process that is killed takes with it what it counted since its last report. Counters begin at 0
where their labels are known from the start, so that `rate` and `increase` see the first rise; where a label shows only
later, the counter begins with it. Of a histogram Ray keeps how many values fell into each bucket: its `_sum` is made of
the buckets' middles, so take means from counters. Each value of a histogram costs Ray's agent about 12 us, so batches
are sampled, {MOST_OBSERVED} a second of each replica: the shares of the buckets are right, `_count`
is not the number of batches.
"""

_RAY_LABELS = """Ray and Serve add `application`, `deployment` and `replica` (in the Serve controller `application`
alone), and `Component`, `NodeAddress`, `SessionName`, `Version`, `WorkerId` and `otel_scope_*`. Sum over what you do
not ask for:
`sum by (group) (rate(ray_expertscale_sent_rows_total[1m]))`.
"""

_BOUNDS = f"""`ray_expertscale_expert_rows_per_second` alone would have {{everything:,}} there: it names the busiest
experts of each layer and sums up the rest: {MOST_EXPERT_SERIES} series at most. They are chosen anew every 30 s at
most; for 20 s after that the endpoint still shows those of the last choice, too, up to twice as many.
No label holds words of
clients, keys or request ids, so no client can make series. Every replica that is started has series of its own: its
counters stay at Ray's agent until that node's Ray stops, its gauges end two report intervals after it.
"""

"""Every metric, once: name with its unit, kind, labels and meaning. Knows no Ray and nobody who counts.

What publishes them is `cluster.metering`; `python -m cluster.metrics` prints infra/prometheus/METRICS.md.
Ray prefixes each name with `ray_` and adds the labels `application`, `deployment` and `replica` of the process that
counts, so none of ours is called like these. Names follow Prometheus: base units, `_total` for what only rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.8, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.08, 0.1, 0.25, 0.5, 1, 2.5)
LAYER_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

MOST_OBSERVED = 50
"""Values a second that one series of a histogram of steps or layers gets: Ray's agent spends 12 us on each."""
_SAMPLED = f"an even sample of at most {MOST_OBSERVED} a second"


@dataclass(frozen=True)
class Metric:
    """name: without Ray's prefix. meaning: one sentence. buckets: upper bounds of a histogram, in the name's unit."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Section:
    """What follows it down to the next one. by: the processes that publish these metrics, each for itself."""

    title: str
    by: str


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"expertscale_{name}_total", "counter", meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"expertscale_{name}", "gauge", meaning, labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"expertscale_{name}", "histogram", meaning, labels, buckets)


_REQUESTS = Section("Requests", "Ingress replica")
REQUESTS = _counter(
    "requests",
    "Requests to generate that ended, those refused before a router was asked included.",
    "endpoint",
    "outcome",
)
REQUEST_ERRORS = _counter("request_errors", "Requests that ended with an error, by its class.", "endpoint", "code")
FINISHED_CHOICES = _counter("finished_choices", "Choices that ended, by their finish reason.", "reason")
RESUMED_REQUESTS = _counter("resumed_requests", "Prompts continued on another router after theirs had failed.")
OPEN_REQUESTS = _gauge("open_requests", "Requests to generate that have arrived and not ended.")
REQUEST_S = _histogram(
    "request_seconds",
    "From a request's arrival at the Ingress to the end of its answer, where that is whole.",
    REQUEST_SECONDS,
    "endpoint",
)
FIRST_TOKEN_S = _histogram(
    "first_token_seconds",
    "From a request's arrival at the Ingress to its first token.",
    FIRST_TOKEN_SECONDS,
    "endpoint",
)
NEXT_TOKEN_S = _histogram(
    "next_token_seconds",
    "Of a finished choice of several tokens: the mean time from one to the next.",
    NEXT_TOKEN_SECONDS,
    "endpoint",
)

_ENGINE = Section("Routers: the engine", "Router replica")
PROMPT_TOKENS = _counter("prompt_tokens", "Prompt tokens computed, those recomputed after a preemption included.")
CACHED_TOKENS = _counter("cached_tokens", "Prompt tokens found in the KV pool instead.")
GENERATED_TOKENS = _counter("generated_tokens", "Tokens generated.")
STEPS = _counter("steps", "Forward passes.")
STEP_S = _counter("step_seconds", "Time spent in steps.")
PREEMPTIONS = _counter("preemptions", "Sequences put back because the KV pool was full.")
REFUSED_REQUESTS = _counter("refused_requests", "Requests turned away by the router's bounds.")
RUNNING = _gauge("running_sequences", "Sequences in the batch.")
WAITING = _gauge("waiting_sequences", "Sequences in the engine's queue.")
KV_USED_TOKENS = _gauge("kv_used_tokens", "Tokens whose keys and values the KV pool holds.")
KV_TOKENS = _gauge("kv_tokens", "Tokens the KV pool can hold.")

_FABRIC = Section("Routers: the fabric", "Router replica")
SCATTERS = _counter("scatters", "MoE layers computed.")
SCATTER_S = _counter(
    "scatter_seconds", "From sending a layer's rows to having all of them back, all MoE layers together."
)
SENT_ROWS = _counter("sent_rows", "Rows sent.", "group")
WAIT_S = _counter("wait_seconds", "From sending a layer's rows to the last of them coming back.", "group")
CRITICAL_S = _counter("critical_seconds", "Time steps waited for the group alone, after all others.", "group")
TRANSPORT_BYTES = _counter("transport_bytes", "Bytes of rows sent and received.", "transport")
RESENT_BATCHES = _counter("resent_batches", "Batches sent again after a failure.")
HEDGED_BATCHES = _counter("hedged_batches", "Late batches raced by a second replica.")
VIEW_AGE_S = _gauge("view_age_seconds", "Since the router last heard from the Directory.")
VIEW_READY_REPLICAS = _gauge("view_ready_replicas", "Replicas the router may send rows to.", "group")

_EXPERTS = Section("Expert replicas", "expert replica")
COMPUTED_ROWS = _counter("computed_rows", "Rows computed.", "group", "pool")
BUSY_S = _counter("busy_seconds", "Time spent computing.", "group", "pool")
BATCHES = _counter("batches", "Batches computed: rows and busy seconds over these are exact means.", "group", "pool")
QUEUED_ROWS = _gauge("queued_rows", "Rows waiting to be computed.", "group", "pool")
SPEED = _gauge("speed_rows_per_second", "Rows of one layer per second, measured at the start.", "group", "pool")
CONNECTIONS = _gauge("connections", "Routers connected.", "group", "pool")
BATCH_SIZE = _histogram("batch_rows", f"Rows of one batch; {_SAMPLED}.", BATCH_ROWS, "group", "pool")
FFN_S = _histogram("ffn_seconds", f"Computing one batch; {_SAMPLED}.", LAYER_SECONDS, "group", "pool")

_DIRECTORY = Section("The cluster, as the Directory knows it", "Directory")
REPLICAS = _gauge("replicas", "Expert replicas by state, as the Directory knows them.", "group", "pool", "state")
READY_REPLICAS = _gauge(
    "ready_replicas",
    "Replicas that answer requests, those of an old version until it has gone; 0 is a group nobody serves.",
    "group",
)
ROUTERS = _gauge("routers", "Routers the Directory hears of.")
START_FAILURES = _counter(
    "start_failures", "Replicas that could not start; those that vanished are counted ten minutes later.", "part"
)
EXPERT_ROWS_PER_S = _gauge(
    "expert_rows_per_second",
    "Rows a second of the busiest experts of each layer; the rest of the layer is expert `other`. About 600 series.",
    "layer",
    "expert",
)
IMBALANCE = _gauge("layer_imbalance_ratio", "Busiest expert of the layer over the mean of all of them.", "layer")
POLICY_SILENCE_S = _gauge("policy_silence_seconds", "Since the Directory last heard from the autoscaler.")
DEGRADED = _gauge("degraded", "1 while `/health` gives the reason, else 0.", "reason")

_AUTOSCALER = Section("The autoscaler", "Serve controller")
TARGET_REPLICAS = _gauge("target_replicas", "Replicas the policy wants.", "group", "pool")
ACTUAL_REPLICAS = _gauge("actual_replicas", "Replicas that run.", "group", "pool")
STARTING_REPLICAS = _gauge("starting_replicas", "Replicas that start.", "group", "pool")
GIVEN_UP_STARTS = _counter("given_up_starts", "Starts given up because they took too long.", "group", "pool")
DECISIONS = _counter(
    "decisions", "Changes of a target, by direction and kind of reason.", "group", "direction", "reason"
)
POLICY_ERROR = _gauge("policy_error", "1 while the policy file as it is on disk cannot be used, else 0.")
POLICY_FAILURES = _counter("policy_failures", "Ticks in which the policy failed and kept its last decision.")
POLICY_TICKS = _counter("policy_ticks", "Times Serve asked the policy.")
SIGNAL_AGE_S = _gauge(
    "signal_age_seconds", "Since the last report of the most silent replica of a group, or of the routers.", "part"
)
HELD_BACK = _gauge("held_back_decisions", "Changes the policy would make if it could.")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


def sections() -> dict[Section, list[Metric]]:
    """All metrics in the order they are declared in."""
    found: dict[Section, list[Metric]] = {}
    for value in list(globals().values()):
        if isinstance(value, Section):
            found[value] = []
        elif isinstance(value, Metric):
            next(reversed(found.values())).append(value)
    return found


if __name__ == "__main__":
    from cluster.metrics_page import page

    print(page(), end="")

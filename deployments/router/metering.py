"""What a router publishes once a second, of what its engine and its dispatcher have counted. Pure; knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.metering import Meter
from cluster.metrics import (
    CACHED_TOKENS,
    CRITICAL_S,
    GENERATED_TOKENS,
    HEDGED_BATCHES,
    KV_TOKENS,
    KV_USED_TOKENS,
    PREEMPTIONS,
    PROMPT_TOKENS,
    REFUSED_REQUESTS,
    RESENT_BATCHES,
    RUNNING,
    SCATTER_S,
    SCATTERS,
    SENT_ROWS,
    STEP_S,
    STEPS,
    TRANSPORT_BYTES,
    VIEW_AGE_S,
    VIEW_READY_REPLICAS,
    WAIT_S,
    WAITING,
)

if TYPE_CHECKING:  # they import torch: only replicas pay for that
    from cluster.fabric.dispatch import DispatchStats
    from deployments.router.load import EngineStats


def tell_engine(meter: Meter, stats: EngineStats) -> None:
    """Tokens, steps and what waits."""
    meter.total(PROMPT_TOKENS, stats.prefill_tokens)
    meter.total(CACHED_TOKENS, stats.cached_tokens)
    meter.total(GENERATED_TOKENS, stats.tokens_generated)
    meter.total(STEPS, stats.steps)
    meter.total(STEP_S, stats.step_s)
    meter.total(PREEMPTIONS, stats.preemptions)
    meter.total(REFUSED_REQUESTS, stats.refused)
    meter.level(RUNNING, stats.running)
    meter.level(WAITING, stats.waiting)
    meter.level(KV_USED_TOKENS, stats.kv_used_tokens)
    meter.level(KV_TOKENS, stats.kv_tokens)


def tell_fabric(meter: Meter, stats: DispatchStats) -> None:
    """Layers, rows and how long they were away."""
    meter.total(SCATTERS, stats.scatters)
    meter.total(SCATTER_S, stats.scatter_s)
    meter.total(RESENT_BATCHES, stats.resends)
    meter.total(HEDGED_BATCHES, stats.hedges)
    for group, traffic in stats.groups.items():
        meter.total(SENT_ROWS, traffic.rows, group=group)
        meter.total(WAIT_S, traffic.wait_s, group=group)
        meter.total(CRITICAL_S, traffic.critical_s, group=group)
    for transport, sent in stats.transport_bytes.items():
        meter.total(TRANSPORT_BYTES, sent, transport=transport)


def tell_view(meter: Meter, age_s: float, ready: Mapping[str, int]) -> None:
    """age_s: since the Directory was last heard. ready: group -> replicas that take rows, of all groups there are."""
    meter.level(VIEW_AGE_S, age_s)
    for group, replicas in ready.items():
        meter.level(VIEW_READY_REPLICAS, replicas, group=group)

"""What replicas and routers say of themselves once a second: plain data, for `/v1/cluster` and for scaling decisions.

Knows neither who sends these nor who reads them. Counters only ever rise within the life of their sender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReplicaStats:
    """The load of one expert replica.

    rows: computed since its start. utilization: busy share of the last interval, 0 to 1.
    queue_rows: waiting to be computed now.
    """

    rows: int = 0
    utilization: float = 0.0
    queue_rows: int = 0


@dataclass(frozen=True)
class RouterStats:
    """The load of one router.

    running, waiting: requests. kv_used_tokens: tokens whose keys and values the KV pool holds.
    transport_bytes: transport name -> bytes sent and received since its start.
    group_rows: group -> rows sent to it since its start.
    critical_share: group -> share of the last interval's step time (0 to 1) that this router waited for that group
        alone, after all others had answered. Empty where no step ran: an idle router knows nothing, not zero.
    digest: of its model, in hex; "" where it has not been said. groups: those it needs, all of them.
    tokens_generated, preemptions: since its start; 0 is what it has done, not what is unknown.
    ttft_p95_ms, tpot_p95_ms: of late, to the first token and from one to the next; None where nobody waited.
    view_age_s: since it last heard from the Directory; None where it has not said.
    """

    id: str
    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    transport_bytes: Mapping[str, int] = field(default_factory=dict)
    group_rows: Mapping[str, int] = field(default_factory=dict)
    critical_share: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    groups: tuple[str, ...] = ()
    tokens_generated: int = 0
    preemptions: int = 0
    ttft_p95_ms: float | None = None
    tpot_p95_ms: float | None = None
    view_age_s: float | None = None


REASON_CHARS = 400


@dataclass(frozen=True)
class StartFailure:
    """A replica that could not start. time: Unix seconds. part: its group, or "router".

    deployment: Serve's name of it. reason: one sentence; what is longer than `REASON_CHARS` is cut.
    digest: of its model, in hex.
    """

    time: float
    part: str
    deployment: str
    reason: str
    digest: str = ""

    def as_json(self) -> dict[str, Any]:
        """As `/v1/cluster` shows it."""
        return {"time": round(self.time, 3), "deployment": self.deployment, "reason": self.reason[:REASON_CHARS]}

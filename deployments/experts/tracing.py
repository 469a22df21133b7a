"""Spans of an expert replica: the FFN of each traced frame, below the scatter that sent it.

Frames that were computed together have a span each, with the batch's size as attributes, and links among them. A frame
that was not computed, as it came too late or its rows were lost, has a span that says why. Knows no sockets and no
weights; loads no OpenTelemetry before the first span.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.fabric.device import Job
from cluster.fabric.frames import Status
from cluster.telemetry import fail, harmless, unpacked

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Tracer


class FfnSpans:
    """For the thread of an `ExpertServer`: its `on_done`. emulated: its device answers no faster than a stated speed.

    clock: that of `Job.arrived`, in seconds. wall_ns: Unix time.
    """

    def __init__(
        self,
        tracer: Tracer,
        *,
        group: str,
        replica_id: str,
        emulated: bool,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._own: dict[str, str | int | float] = {
            "expertscale.group": group,
            "expertscale.replica": replica_id,
            "expertscale.emulated": emulated,
        }
        self._clock = clock
        self._wall_ns = wall_ns

    @harmless
    def __call__(self, jobs: Sequence[Job[Any]], done_s: float) -> None:
        """`jobs` were answered, those of one batch at once; `done_s`: when it was done, by `clock`."""
        traced = [job for job in jobs if job.frame.trace]
        if not traced:
            return
        from opentelemetry.trace import Link, SpanKind

        done_ns = self._wall_ns() - int((self._clock() - done_s) * 1e9)
        ran = [job for job in jobs if job.compute_s]
        links: list[Link] = []
        for job in traced:
            waited_s = max(0.0, done_s - job.arrived - job.compute_s)
            attributes = {
                **self._own,
                "expertscale.layer": job.frame.layer,
                "expertscale.rows": job.frame.rows,
                "expertscale.waited_ms": 1e3 * waited_s,
                "expertscale.batch.rows": sum(each.frame.rows for each in ran),
                "expertscale.batch.frames": len(ran),
            }
            span = self._tracer.start_span(
                "ffn",
                unpacked(job.frame.trace),
                SpanKind.SERVER,
                attributes,
                list(links),
                start_time=done_ns - int(job.compute_s * 1e9),
            )
            if job.status is not Status.OK:
                # The class only where the experts raised: a message may say anything.
                fail(span, job.message.partition(":")[0] if job.compute_s else job.status.name)
            links.append(Link(span.get_span_context()))
            span.end(done_ns)

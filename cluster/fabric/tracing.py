"""Spans of the layers of a traced step: each layer, and below it every batch from its sending to its answer.

A traced layer runs over a `TracedTransport`, which looks at what passes between the scatter and its real transport, and
gives every batch the context of its span, so that the replica's own hangs below it. Untraced layers never meet it.
Knows no engine, no choice of replicas and no wire format. What goes wrong here is logged and changes nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.fabric.transport import Batch, Call, Transport
from cluster.membership import Replica
from cluster.telemetry import fail, harmless, packed

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

ANSWERED, FAILED, DROPPED = "answered", "failed", "dropped"
"""What became of a batch. Dropped: nobody waited for the answer any more, as another one was first or time was up."""


class LayerSpans:
    """What a `Dispatcher` is given for one step. parent: the context of the step's span. wall_ns: Unix time."""

    def __init__(self, tracer: Tracer, parent: Context, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._tracer = tracer
        self._parent = parent
        self._wall_ns = wall_ns

    @contextmanager
    def layer(self, transport: Transport, layer: int, *, tokens: int, rows: int) -> Iterator[Transport]:
        """The transport that one layer is to use; its span ends with the block, and fails with it."""
        traced = TracedTransport(transport, self._tracer, self._parent, self._wall_ns)
        traced.begin({"expertscale.layer": layer, "expertscale.tokens": tokens, "expertscale.rows": rows})
        try:
            yield traced
        except Exception as error:
            traced.end(error)
            raise
        traced.end(None)


class TracedTransport:
    """`inner`, told of by spans from `begin` to `end`; see `transport.Transport` for what every method promises."""

    def __init__(self, inner: Transport, tracer: Tracer, parent: Context, wall_ns: Callable[[], int]) -> None:
        self.name = inner.name
        self._inner = inner
        self._tracer = tracer
        self._parent = parent
        self._wall_ns = wall_ns
        self._layer: Span | None = None
        self._below = parent
        # By id; the call is kept with its span: as long as it lives, no other can have its id.
        self._open: dict[int, tuple[Call, Span]] = {}

    @property
    def bytes_sent(self) -> int:
        """Of the real one."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Of the real one."""
        return self._inner.bytes_received

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        """Where connecting has failed, the layer's span says so."""
        try:
            return self._inner.prepare(replica, patience_s)
        except Exception as error:
            self._unreachable(replica, error)
            raise

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        """Give the batch a span, and its context along."""
        span = self._start(replica, batch)
        try:
            call = self._inner.send(replica, batch, deadline_s)
        except Exception as error:
            if span is not None:
                self._finish(span, FAILED, error)
            raise
        if span is not None:
            self._open[id(call)] = (call, span)
        return call

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        """An answer ends its span."""
        done = self._inner.wait(calls, timeout_s)
        for call in done:
            self._settle(call)
        return done

    def forget(self, call: Call, *, watched: bool = False) -> None:
        """So does nobody's waiting for it any more."""
        self._settle(call, wanted=False)
        self._inner.forget(call, watched=watched)

    def retain(self, replica_ids: Collection[str]) -> None:
        """Nothing to tell."""
        self._inner.retain(replica_ids)

    def close(self) -> None:
        """Nothing to tell."""
        self._inner.close()

    @harmless
    def begin(self, attributes: dict[str, int]) -> None:
        """Start the layer's span."""
        from opentelemetry.trace import set_span_in_context

        self._layer = self._tracer.start_span("layer", self._parent, attributes=attributes, start_time=self._wall_ns())
        self._below = set_span_in_context(self._layer, self._parent)

    @harmless
    def end(self, error: Exception | None) -> None:
        """End it. Batches that nobody waits for any more are not watched further: their answers would be too late."""
        for call, _ in list(self._open.values()):
            self._settle(call, wanted=False)
        if self._layer is not None:
            if error is not None:
                fail(self._layer, type(error).__name__)
            self._layer.end(self._wall_ns())

    @harmless
    def _start(self, replica: Replica, batch: Batch) -> Span:
        from opentelemetry.trace import SpanKind

        rows, hidden = len(batch.index), batch.hidden
        attributes: dict[str, str | int] = {
            "expertscale.group": batch.group,
            "expertscale.replica": replica.id,
            "expertscale.rows": rows,
            "expertscale.bytes": rows * hidden.shape[1] * hidden.itemsize,
            "expertscale.attempt": batch.attempt,
        }
        span = self._tracer.start_span("scatter", self._below, SpanKind.CLIENT, attributes, start_time=self._wall_ns())
        batch.trace = packed(span)
        return span

    @harmless
    def _settle(self, call: Call, *, wanted: bool = True) -> None:
        """wanted: somebody waited for it; else nobody has heard what became of it, done or not."""
        known = self._open.pop(id(call), None)
        if known is not None:
            outcome, error = (FAILED if call.error else ANSWERED, call.error) if wanted else (DROPPED, None)
            self._finish(known[1], outcome, error, call.transport)

    @harmless
    def _finish(self, span: Span, outcome: str, error: Exception | None, transport: str = "") -> None:
        """transport: "" where it could not be sent."""
        about = {"expertscale.outcome": outcome}
        span.set_attributes({**about, "expertscale.transport": transport} if transport else about)
        if error is not None:
            fail(span, type(error).__name__)
        span.end(self._wall_ns())

    @harmless
    def _unreachable(self, replica: Replica, error: Exception) -> None:
        if self._layer is not None:
            attributes = {"expertscale.replica": replica.id, "error.type": type(error).__name__}
            self._layer.add_event("unreachable", attributes, self._wall_ns())

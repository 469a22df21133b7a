"""Spans of FFNs: what they say, whose children they are, and that nothing hangs on them (2 s)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, set_span_in_context
from torch import Tensor

from cluster.fabric.device import Device, Job
from cluster.fabric.frames import Frame, Kind
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.store_codec import StoreCodec
from cluster.fabric.tracing import LayerSpans
from deployments.experts.tracing import FfnSpans
from tests.cluster.fabric import small_experts as small
from tests.cluster.fabric.serving import until
from tests.spans import BrokenTracer, KeptSpans, milliseconds, said

LAYER = 3
TRACES = [bytes([number]) * 24 for number in (1, 2)]


class Replica:
    """An emulated device of a row per second, and the spans of what it computes, at a scripted time."""

    def __init__(self) -> None:
        self.kept, self.now = KeptSpans(), 0.0
        self.spans = FfnSpans(
            self.kept.tracer,
            group="experts-0",
            replica_id="r",
            emulated=True,
            clock=lambda: self.now,
            wall_ns=lambda: round(self.now * 1e9),
        )
        self._device: Device[str] = Device(_compute, rows_per_s=1.0, references=None)

    def add(self, rows: int, trace: bytes, *, late_ms: int = 60_000, value: float = 0.0) -> None:
        self._device.add(
            "router",
            Frame(
                Kind.ROWS,
                layer=LAYER,
                rows=rows,
                hidden=2,
                dtype=torch.float32,
                deadline_ms=late_ms,
                trace=trace,
                counts=torch.tensor([rows]),
                tensor=torch.full((rows, 2), value),
            ),
            self.now,
        )

    def at(self, now: float) -> list[Job[str]]:
        """What a server does when it wakes."""
        self.now = now
        jobs = self._device.step(now)
        if jobs:
            self.spans(jobs, now)
        return jobs


def _compute(layer: int, counts: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG001
    if bool(rows.isnan().any()):
        raise ValueError("quotes a secret")
    return rows


def parent(span: ReadableSpan) -> bytes:
    """As a frame carries it."""
    assert span.parent is not None
    assert span.parent.is_remote
    return span.parent.trace_id.to_bytes(16, "big") + span.parent.span_id.to_bytes(8, "big")


def test_an_ffn_is_a_span_below_the_frames_context() -> None:
    replica = Replica()
    replica.add(2, TRACES[0])
    assert replica.at(0.5) == []
    assert len(replica.at(2.0)) == 1
    [ffn] = replica.kept.named("ffn")
    assert parent(ffn) == TRACES[0]
    assert ffn.kind is SpanKind.SERVER
    assert said(ffn) == {
        "group": "experts-0",
        "replica": "r",
        "emulated": True,
        "layer": LAYER,
        "rows": 2,
        "waited_ms": 0.0,
        "batch.rows": 2,
        "batch.frames": 1,
    }
    assert milliseconds(ffn) == (0, 2000)


def test_frames_of_one_batch_have_a_span_each_and_links_among_them() -> None:
    replica = Replica()
    replica.add(1, b"")
    replica.at(0.0)
    for rows, trace in ((2, TRACES[0]), (1, b""), (3, TRACES[1])):
        replica.add(rows, trace)
    replica.at(1.0)  # the first frame's answer leaves
    replica.at(1.0)  # the other three begin
    assert len(replica.at(7.0)) == 3
    first, second = replica.kept.named("ffn")
    assert (parent(first), parent(second)) == tuple(TRACES)
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert [(said(span)["rows"], said(span)["batch.rows"], said(span)["batch.frames"]) for span in (first, second)] == [
        (2, 6, 3),
        (3, 6, 3),
    ]
    assert [said(span)["waited_ms"] for span in (first, second)] == [1000.0, 1000.0]
    assert milliseconds(first) == milliseconds(second) == (1000, 7000)


def test_what_nobody_traces_leaves_nothing() -> None:
    replica = Replica()
    replica.add(1, b"")
    replica.at(0.0)
    assert len(replica.at(1.0)) == 1
    assert replica.kept.ended == ()


def test_a_failed_ffn_says_which_class_of_error_and_no_more() -> None:
    replica = Replica()
    replica.add(1, TRACES[0], value=float("nan"))
    replica.at(0.0)
    replica.at(1.0)
    [ffn] = replica.kept.named("ffn")
    assert said(ffn)["error.type"] == ffn.status.description == "ValueError"


def test_a_frame_that_came_too_late_has_a_span_of_no_length_that_says_so() -> None:
    replica = Replica()
    replica.add(1, TRACES[0], late_ms=500)
    assert len(replica.at(0.6)) == 1
    [ffn] = replica.kept.named("ffn")
    assert said(ffn)["error.type"] == "LATE"
    assert milliseconds(ffn) == (600, 600)


@pytest.mark.parametrize("through", ["stream", "object_store"])
def test_each_ffn_hangs_below_the_scatter_that_sent_its_rows(through: str, tmp_path: Path) -> None:
    kept, store = KeptSpans(), small.MemoryReferences()

    def spans(group: int) -> FfnSpans:
        return FfnSpans(kept.tracer, group=f"experts-{group}", replica_id=f"r{group}", emulated=False)

    with small.serving(tmp_path, references=StoreCodec(store), on_done=spans) as (view, _):
        stream = small.new_stream()
        transport = stream if through == "stream" else ObjectStoreTransport(stream, store)
        dispatcher = small.dispatcher(transport, view)
        plain = dispatcher.scatter_gather(small.LAYER, *small.layer_input(8, torch.float32))
        step = kept.tracer.start_span("step")
        dispatcher.tracing = LayerSpans(kept.tracer, set_span_in_context(step))
        traced = dispatcher.scatter_gather(small.LAYER, *small.layer_input(8, torch.float32))
        step.end()
        until(lambda: len(kept.named("ffn")) == small.GROUPS)
        transport.close()
    assert torch.equal(plain, traced)
    assert kept.tree(lambda span: f"{span.name} {said(span).get('group', '')}".strip()) == [
        "step",
        "  layer",
        "    scatter experts-0",
        "      ffn experts-0",
        "    scatter experts-1",
        "      ffn experts-1",
    ]
    computed = sorted(kept.named("ffn"), key=lambda span: str(said(span)["group"]))
    for scatter, ffn in zip(kept.named("scatter"), computed, strict=True):
        assert said(scatter)["transport"] == through
        assert said(scatter)["rows"] == said(ffn)["rows"] == said(ffn)["batch.rows"]
        assert (scatter.start_time or 0) <= (ffn.start_time or 0) <= (ffn.end_time or 0) <= (scatter.end_time or 0)


def test_spans_that_cannot_be_made_cost_no_answer(tmp_path: Path) -> None:
    broken: Any = BrokenTracer()
    kept = KeptSpans()

    def spans(group: int) -> FfnSpans:
        return FfnSpans(broken, group=f"experts-{group}", replica_id="r", emulated=False)

    with small.serving(tmp_path, on_done=spans) as (view, servers):
        transport = small.new_stream()
        dispatcher = small.dispatcher(transport, view)
        dispatcher.tracing = LayerSpans(kept.tracer, set_span_in_context(kept.tracer.start_span("step")))
        for _ in range(2):
            dispatcher.scatter_gather(small.LAYER, *small.layer_input(8, torch.float32))
        assert all(server.alive for server in servers)
        transport.close()
    assert len(kept.named("scatter")) == 2 * small.GROUPS

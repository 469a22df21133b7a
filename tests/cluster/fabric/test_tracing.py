"""Spans of layers and batches, over a scripted transport and a clock moved by waits (1 s)."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span, SpanKind, set_span_in_context

from cluster.errors import ExpertsUnavailableError, FabricError, ReplicaLostError
from cluster.fabric.hedging import FLOOR_S
from cluster.fabric.peers import AVOID_S
from cluster.fabric.tracing import LayerSpans
from cluster.telemetry import packed
from tests.cluster.fabric.scripted import (
    BOTH,
    FIRST,
    HIDDEN,
    LAYER,
    ROUND_TRIP_S,
    Behaviour,
    Router,
    replica,
)
from tests.spans import BrokenTracer, KeptSpans, milliseconds, said

WHOLE_STEP = "step"


class TracedRouter:
    """A scripted router inside a traced step, its Unix time that of the scripted clock."""

    def __init__(self, router: Router) -> None:
        self.router, self.kept = router, KeptSpans()
        self._step: Span = self.kept.tracer.start_span(WHOLE_STEP, start_time=self.now_ns())
        spans = LayerSpans(self.kept.tracer, set_span_in_context(self._step), self.now_ns)
        router.dispatcher.tracing = spans

    def now_ns(self) -> int:
        return round(self.router.clock.now * 1e9)

    def tree(self) -> list[str]:
        self._step.end(self.now_ns())
        return self.kept.tree(self._label)

    def _label(self, span: ReadableSpan) -> str:
        about = said(span)
        if span.name != "scatter":
            return " ".join([span.name, *(["failed"] if "error.type" in about else [])])
        return f"scatter {about['replica']} {about['attempt']} {about['outcome']}"


def test_a_layer_is_a_span_and_so_is_each_batch_below_it() -> None:
    traced = TracedRouter(Router(replica("a"), replica("b", 1)))
    traced.router.step(BOTH)
    traced.router.step(FIRST)
    assert traced.tree() == [
        "step",
        "  layer",
        "    scatter a first answered",
        "    scatter b first answered",
        "  layer",
        "    scatter a first answered",
    ]
    layers, batches = traced.kept.named("layer"), traced.kept.named("scatter")
    assert [said(span) for span in layers] == [
        {"layer": LAYER, "tokens": 3, "rows": 6},
        {"layer": LAYER, "tokens": 2, "rows": 4},
    ]
    assert said(batches[0]) == {
        "group": "experts-0",
        "replica": "a",
        "rows": 3,
        "bytes": 3 * HIDDEN * 4,
        "attempt": "first",
        "transport": "fake",
        "outcome": "answered",
    }
    assert [milliseconds(span) for span in (*layers, *batches)] == [(0, 1), (1, 2), (0, 1), (0, 1), (1, 2)]
    assert {span.kind for span in batches} == {SpanKind.CLIENT}


def test_each_batch_carries_its_own_spans_context() -> None:
    traced = TracedRouter(Router(replica("a"), replica("b", 1)))
    traced.router.step(BOTH)
    carried = [batch.trace for _, batch in traced.router.transport.sent]
    assert carried == [packed(span) for span in traced.kept.named("scatter")]  # type: ignore[arg-type]
    assert len({*carried}) == 2


def test_an_untraced_layer_carries_nothing_and_leaves_nothing() -> None:
    traced = TracedRouter(Router(replica("a"), replica("b", 1)))
    traced.router.dispatcher.tracing = None
    traced.router.step(BOTH)
    assert [batch.trace for _, batch in traced.router.transport.sent] == [b"", b""]
    assert traced.tree() == ["step"]


@pytest.mark.parametrize("error", [ReplicaLostError("gone"), FabricError("ValueError: quotes a secret")])
def test_a_batch_that_failed_says_so_and_the_next_one_that_it_comes_again(error: FabricError) -> None:
    traced = TracedRouter(Router(replica("a", speed=2e6), replica("b")))
    traced.router.behave("a", Behaviour(errors=[error]))
    traced.router.step(FIRST)
    assert traced.tree() == [
        "step",
        "  layer",
        "    scatter a first failed",
        "    scatter b resend answered",
    ]
    failed, again = traced.kept.named("scatter")
    assert said(failed)["error.type"] == failed.status.description == type(error).__name__
    assert again.status.is_unset
    assert milliseconds(again) == (1, 2)


def test_a_batch_that_could_not_be_sent_has_a_span_as_well() -> None:
    traced = TracedRouter(Router(replica("a", speed=2e6), replica("b")))
    traced.router.behave("a", Behaviour(refuses=ReplicaLostError("gone")))
    traced.router.step(FIRST)
    assert traced.tree()[2:] == ["    scatter a first failed", "    scatter b resend answered"]
    assert milliseconds(traced.kept.named("scatter")[0]) == (0, 0)


def test_a_late_batch_is_dropped_when_the_one_that_raced_it_is_answered() -> None:
    router = Router(replica("a", speed=2e6), replica("b"), hedge_after=3.0)
    for _ in range(20):
        router.step(FIRST)
    begun_ms = 1e3 * router.clock.now
    router.behave("a", Behaviour(answer_s=9.0))
    traced = TracedRouter(router)
    router.step(FIRST)
    assert traced.tree() == ["step", "  layer", "    scatter a first dropped", "    scatter b hedge answered"]
    late, hedge = traced.kept.named("scatter")
    assert not late.status.description
    sent_ms, answered_ms = (each - begun_ms for each in milliseconds(hedge))
    assert sent_ms == pytest.approx(1e3 * FLOOR_S, abs=1)
    assert answered_ms == pytest.approx(sent_ms + 1e3 * ROUND_TRIP_S)
    assert milliseconds(late)[1] == milliseconds(hedge)[1]


@pytest.mark.parametrize("answer_s", [0.5, ROUND_TRIP_S / 2])
def test_a_probe_is_no_hedge_and_nobody_waits_for_it(answer_s: float) -> None:
    router = Router(replica("a", speed=2e6), replica("b", speed=1e5), hedge_after=3.0)
    for _ in range(20):
        router.step(FIRST)
    router.dispatcher._peers.by_id["b"].failed("was slow", router.clock.now)
    router.clock.pass_until(router.clock.now + AVOID_S / 2)
    router.behave("b", Behaviour(answer_s=answer_s))
    traced = TracedRouter(router)
    router.step(FIRST)
    attempts = {said(span)["attempt"]: said(span) for span in traced.kept.named("scatter")}
    assert attempts.keys() == {"first", "probe"}
    assert (attempts["probe"]["replica"], attempts["probe"]["outcome"]) == ("b", "dropped")


def test_a_layer_that_fails_ends_all_its_spans() -> None:
    traced = TracedRouter(Router(replica("a")))
    with pytest.raises(ExpertsUnavailableError):
        traced.router.step(BOTH)
    assert traced.tree() == ["step", "  layer failed", "    scatter a first answered"]
    [layer] = traced.kept.named("layer")
    assert said(layer)["error.type"] == "ExpertsUnavailableError"


def test_a_replica_that_cannot_be_connected_to_is_an_event_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = TracedRouter(Router(replica("a", speed=2e6), replica("b")))
    real = traced.router.transport.prepare

    def prepare(asked: Any, patience_s: float) -> bool:
        if asked.id == "a":
            raise ReplicaLostError("refused")
        return real(asked, patience_s)

    monkeypatch.setattr(traced.router.transport, "prepare", prepare)
    traced.router.step(FIRST)
    [layer] = traced.kept.named("layer")
    assert [(event.name, event.attributes) for event in layer.events] == [
        ("unreachable", {"expertscale.replica": "a", "error.type": "ReplicaLostError"})
    ]


def test_spans_that_cannot_be_made_cost_no_row(caplog: pytest.LogCaptureFixture) -> None:
    router = Router(replica("a"), replica("b", 1))
    broken: Any = BrokenTracer()
    router.dispatcher.tracing = LayerSpans(broken, set_span_in_context(KeptSpans().tracer.start_span("step")))
    for _ in range(3):
        router.step(BOTH)  # checks its result
    assert [batch.trace for _, batch in router.transport.sent] == [b""] * 6
    assert len([line for line in caplog.messages if "a span is lost" in line]) <= 2

"""Spans of the engine's steps and of the layers below them, at a scripted time (2 s)."""

from __future__ import annotations

from dataclasses import replace

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span

from cluster.errors import FabricError
from cluster.fabric.scatter import COMPUTE_TRIES
from cluster.telemetry import traceparent
from deployments.generation import GenerationRequest
from deployments.router.engine import Engine
from deployments.router.step import StepInput
from deployments.router.tracing import BURST, EARNED, EARNED_PER_S, StepSpans
from tests.cluster.fabric.scripted import BOTH, Behaviour, Router, replica
from tests.deployments.router.fake_backbone import FakeBackbone, Inbox, make_request
from tests.spans import KeptSpans, milliseconds, said

WHO = {"queue": "choice", "prefill": "tokens", "decode": "output", "layer": "tokens", "scatter": "group"}


class Story:
    """An engine whose model is fake, but computes one layer on scripted replicas in every step."""

    def __init__(self) -> None:
        self.kept = KeptSpans()
        self.router = Router(replica("a"), replica("b", 1))
        self.backbone = FakeBackbone()
        self.backbone.before_forward = self._layer
        self.engine = Engine(
            self.backbone,
            max_batch_tokens=16,
            max_sequences=4,
            max_queued_requests=8,
            tracing=StepSpans(self.kept.tracer, self.router.dispatcher, clock=self.router.clock, wall_ns=self.wall_ns),
            clock=self.router.clock,
        )

    def wall_ns(self) -> int:
        return round(self.router.clock.now * 1e9)

    def _layer(self, step: StepInput) -> None:  # noqa: ARG002
        self.router.step(BOTH)

    def request(self, name: str) -> Span:
        """The span of a request that is traced."""
        return self.kept.tracer.start_span(name, start_time=self.wall_ns())

    def submit(self, name: str, root: Span | None, tokens: int = 2) -> Inbox:
        asked: GenerationRequest = make_request([5, 6, 7], name, max_tokens=tokens, logit_bias={0: -100.0})
        inbox = Inbox()
        self.engine.submit(replace(asked, trace=traceparent(root) if root is not None else ""), inbox)
        return inbox

    def run(self) -> None:
        while self.engine.turn():
            pass

    def tree(self, *roots: Span) -> list[str]:
        for root in roots:
            root.end(self.wall_ns())
        return self.kept.tree(_label)


def _label(span: ReadableSpan) -> str:
    about = said(span)
    parts = [span.name, str(about[WHO[span.name]])] if span.name in WHO else [span.name]
    return " ".join([*parts, *(["failed"] if "error.type" in about else [])])


def test_the_layers_of_a_step_hang_below_its_first_traced_sequence_and_links_tie_the_others() -> None:
    story = Story()
    one, two = story.request("one"), story.request("two")
    story.submit("none", None)
    story.submit("one", one)
    story.submit("two", two)
    story.run()
    layer = ["    layer 3", "      scatter experts-0", "      scatter experts-1"]
    assert story.tree(one, two) == [
        *("one", "  queue 0", "  prefill 3", *layer, "  decode 1", *layer),
        *("two", "  queue 0", "  prefill 3", "  decode 1"),
    ]
    for first, second in (story.kept.named("prefill"), story.kept.named("decode")):
        assert [link.context.span_id for link in second.links] == [first.context.span_id]
        assert said(first)["step.sequences"] == 3
        assert milliseconds(first) == milliseconds(second)
    assert [milliseconds(span) for span in story.kept.named("layer")] == [(0, 1), (1, 2)]
    assert story.router.dispatcher.tracing is None


def test_a_step_that_fails_ends_its_spans_as_failed_and_the_next_one_has_its_own() -> None:
    story = Story()
    story.router.behave("a", Behaviour(errors=[FabricError("quotes a secret")] * COMPUTE_TRIES))
    one, two = story.request("one"), story.request("two")
    story.submit("one", one)
    story.run()
    story.submit("two", two, tokens=1)
    story.run()
    layer = ["    layer 3", "      scatter experts-0", "      scatter experts-1"]
    assert story.tree(one, two) == [
        *("one", "  queue 0", "  prefill 3 failed", "    layer 3 failed"),
        *("      scatter experts-0 failed", "      scatter experts-1", "      scatter experts-0 failed"),
        *("two", "  queue 0", "  prefill 3", *layer),
    ]
    assert said(story.kept.named("prefill")[0])["error.type"] == "EngineError"
    assert "secret" not in str([span.to_json() for span in story.kept.ended])


def test_however_many_requests_are_traced_only_some_steps_have_layers() -> None:
    story = Story()
    root = story.request("root")
    for number in range(100):
        story.submit(f"request {number}", root, tokens=4)
        story.run()
    steps = story.engine.stats().steps
    assert steps == len(story.kept.named("prefill")) + len(story.kept.named("decode")) == 400
    allowed = BURST + EARNED * steps
    assert allowed - 2 <= len(story.kept.named("layer")) <= allowed
    before = len(story.kept.named("layer"))
    story.router.clock.now += 4.0 / EARNED_PER_S  # a router at rest saves up, too
    story.submit("later", root, tokens=4)
    story.run()
    assert len(story.kept.named("layer")) - before == 4


def test_a_step_that_nobody_traces_leaves_nothing_and_its_rows_carry_nothing() -> None:
    story = Story()
    story.submit("none", None)
    story.run()
    assert story.kept.ended == ()
    assert {batch.trace for _, batch in story.router.transport.sent} == {b""}

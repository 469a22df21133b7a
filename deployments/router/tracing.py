"""Spans of the engine for requests that are traced: queue, prefill and some decode steps. Others are not looked at.

A step serves many sequences at once. Each traced one gets a span of its own of the step, below its request, with the
step's size as attributes, and links to those of the other traced ones. The first of them is the parent of the step's
layers, which `cluster.fabric.tracing` adds below it: they are computed once, whoever asked. Those are many spans, and
all requests of the step wait for them, so only some steps have them, however many requests are traced.
Knows no engine, no transport and no experts. What goes wrong here is logged and changes nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from cluster.fabric.tracing import LayerSpans
from cluster.telemetry import fail, harmless, parent

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from deployments.router.scheduler import Plan
    from deployments.router.sequence import Sequence

FIRST_STEPS = 4
EVERY_STEPS = 32
"""Decode steps with a span: the first `FIRST_STEPS` of a sequence, then each whose number `EVERY_STEPS` divides."""
EARNED, EARNED_PER_S, BURST = 1 / 64, 0.5, 32.0
"""Steps with spans of their layers that one step of any kind earns, that a second earns, and how many can be saved up:
five traces made by hand have all of theirs, and a router that makes 60 steps a second one in 42, whoever asks."""


def is_sampled(step: int) -> bool:
    """Whether decode step `step` of a sequence, from 1, gets a span.

    >>> [step for step in range(1, 70) if is_sampled(step)]
    [1, 2, 3, 4, 32, 64]
    """
    return step <= FIRST_STEPS or step % EVERY_STEPS == 0


class Traceable(Protocol):
    """What is traced: a `Dispatcher`."""

    tracing: LayerSpans | None


class StepSpans:
    """For the engine's thread.

        begin(plan)     the step is about to run
        end(plan)       it has succeeded
        failed(error)   or it has not

    dispatcher: where the layers are computed; None without spans of them. clock: the engine's; wall_ns: Unix time.
    """

    def __init__(
        self,
        tracer: Tracer,
        dispatcher: Traceable | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._dispatcher = dispatcher
        self._clock = clock
        self._wall_ns = wall_ns
        self._begun: WeakSet[Sequence] = WeakSet()
        self._open: list[Span] = []
        self._budget = BURST
        self._earned_at = clock()

    @harmless
    def begin(self, plan: Plan) -> None:
        """Start the spans of the sequences that want one of this step, and end the queueing of those that start."""
        now, before = self._clock(), self._earned_at
        self._earned_at = now
        self._budget = min(BURST, self._budget + EARNED + EARNED_PER_S * max(0.0, now - before))
        if self._open:  # left by a step that had no end
            self._close(None)
        traced: list[tuple[Sequence, int, str, int]] = []
        for sequence, part in zip(plan.sequences, plan.step.slices, strict=True):
            if not sequence.request.trace:
                continue
            if sequence not in self._begun:
                self._begun.add(sequence)
                self._queued(sequence)
            # A decode step computes the last token alone; its number is how many came after the prompt.
            step = len(sequence.tokens) - len(sequence.request.tokens)
            if step < 1 or part.length > 1:
                traced.append((sequence, part.length, "prefill", step))
            elif is_sampled(step):
                traced.append((sequence, part.length, "decode", step))
        if traced:
            self._start(plan, traced)

    @harmless
    def end(self, plan: Plan) -> None:  # noqa: ARG002 - as of `RoutingRecord`
        """End the spans of the step."""
        if self._open:
            self._close(None)

    @harmless
    def failed(self, error: Exception) -> None:
        """End them as failed."""
        if self._open:
            self._close(error)

    def _start(self, plan: Plan, traced: list[tuple[Sequence, int, str, int]]) -> None:
        from opentelemetry.trace import Link, set_span_in_context

        began_ns = self._wall_ns()
        size = {"expertscale.step.sequences": len(plan.sequences), "expertscale.step.tokens": len(plan.step.tokens)}
        links: list[Link] = []
        for sequence, tokens, name, step in traced:
            own = {"expertscale.choice": sequence.choice, "expertscale.tokens": tokens, "expertscale.output": step}
            context = parent(sequence.request.trace)
            span = self._tracer.start_span(
                name, context, attributes={**size, **own}, links=list(links), start_time=began_ns
            )
            if span.is_recording():
                self._open.append(span)
                links.append(Link(span.get_span_context()))
        if self._open and self._dispatcher is not None and self._budget >= 1.0:
            self._budget -= 1.0
            self._dispatcher.tracing = LayerSpans(self._tracer, set_span_in_context(self._open[0]), self._wall_ns)

    def _close(self, error: Exception | None) -> None:
        if self._dispatcher is not None:
            self._dispatcher.tracing = None
        spans, self._open = self._open, []
        ended_ns = self._wall_ns()
        for span in spans:
            if error is not None:
                fail(span, type(error).__name__)
            span.end(ended_ns)

    def _queued(self, sequence: Sequence) -> None:
        now_ns = self._wall_ns()
        waited_s = max(0.0, self._clock() - sequence.awaited_since_s)
        context, own = parent(sequence.request.trace), {"expertscale.choice": sequence.choice}
        span = self._tracer.start_span("queue", context, attributes=own, start_time=now_ns - int(waited_s * 1e9))
        span.end(now_ns)

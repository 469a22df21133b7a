"""Spans of the engine for requests that are traced: queue, prefill and some decode steps. Others are not looked at.

A step serves many sequences at once. Each traced one gets a span of its own of the step, below its request, with the
step's size as attributes, and links to those of the other traced ones. A step that fails leaves no span: the request's
own says how it ended. Knows no engine, no transport and no experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

from cluster.telemetry import parent

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from deployments.router.scheduler import Plan
    from deployments.router.sequence import Sequence

FIRST_STEPS = 4
EVERY_STEPS = 32
"""Decode steps with a span: the first `FIRST_STEPS` of a sequence, then each whose number `EVERY_STEPS` divides."""


def is_sampled(step: int) -> bool:
    """Whether decode step `step` of a sequence, from 1, gets a span.

    >>> [step for step in range(1, 70) if is_sampled(step)]
    [1, 2, 3, 4, 32, 64]
    """
    return step <= FIRST_STEPS or step % EVERY_STEPS == 0


class StepSpans:
    """For the engine's thread; `begin` and `end` as of `RoutingRecord`. clock: the engine's; wall_ns: Unix time."""

    def __init__(
        self,
        tracer: Tracer,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracer
        self._clock = clock
        self._wall_ns = wall_ns
        self._begun: WeakSet[Sequence] = WeakSet()
        self._traced: list[tuple[Sequence, int, str, int]] = []
        self._began_ns = 0

    def begin(self, plan: Plan) -> None:
        """Note which sequences of the step want a span of it, and end the queueing of those that start."""
        self._traced = []
        for sequence, part in zip(plan.sequences, plan.step.slices, strict=True):
            if not sequence.request.trace:
                continue
            if sequence not in self._begun:
                self._begun.add(sequence)
                self._queued(sequence)
            # A decode step computes the last token alone; its number is how many came after the prompt.
            step = len(sequence.tokens) - len(sequence.request.tokens)
            if step < 1 or part.length > 1:
                self._traced.append((sequence, part.length, "prefill", step))
            elif is_sampled(step):
                self._traced.append((sequence, part.length, "decode", step))
        if self._traced:
            self._began_ns = self._wall_ns()

    def end(self, plan: Plan) -> None:
        """The step has succeeded: its spans."""
        if not self._traced:
            return
        from opentelemetry.trace import Link

        ended_ns = self._wall_ns()
        size = {"expertscale.step.sequences": len(plan.sequences), "expertscale.step.tokens": len(plan.step.tokens)}
        links: list[Link] = []
        for sequence, tokens, name, step in self._traced:
            own = {"expertscale.choice": sequence.choice, "expertscale.tokens": tokens, "expertscale.output": step}
            context = parent(sequence.request.trace)
            span = self._tracer.start_span(
                name, context, attributes={**size, **own}, links=list(links), start_time=self._began_ns
            )
            links.append(Link(span.get_span_context()))
            span.end(ended_ns)
        self._traced = []

    def _queued(self, sequence: Sequence) -> None:
        now_ns = self._wall_ns()
        waited_s = max(0.0, self._clock() - sequence.awaited_since_s)
        context, own = parent(sequence.request.trace), {"expertscale.choice": sequence.choice}
        span = self._tracer.start_span("queue", context, attributes=own, start_time=now_ns - int(waited_s * 1e9))
        span.end(now_ns)

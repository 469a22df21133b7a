"""The root of a trace: one span for each HTTP request that generates, named and labelled by the GenAI conventions.

It starts once the request has passed its checks, so one that was refused with a status of its own leaves none, and it
ends with the request's streams. Never a prompt, a text or a token. Conventions:
https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.telemetry import fail, harmless, parent, traceparent
from deployments.generation import GenerationRequest
from deployments.ingress.clients import RouterClient
from deployments.ingress.logged import LoggedGeneration

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer


def tracing(
    tracer: Tracer | None, headers: Mapping[str, str], *, model: str, id: str, chat: bool
) -> Callable[..., LoggedGeneration]:
    """What makes the `Generation` of a request: the class itself where traces are off."""
    if tracer is None:
        return LoggedGeneration

    def make(router: RouterClient, requests: Sequence[GenerationRequest], **others: Any) -> LoggedGeneration:
        span = _root(tracer, headers, model, id, chat, requests[0])
        if span is None:
            return LoggedGeneration(router, requests, **others)
        return TracedGeneration(span, router, requests, **others)

    return make


@harmless
def _root(
    tracer: Tracer, headers: Mapping[str, str], model: str, id: str, chat: bool, request: GenerationRequest
) -> Span:
    from opentelemetry.trace import SpanKind

    operation = "chat" if chat else "text_completion"
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "expertscale",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": id,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.choice.count": request.sampling.n,
        "expertscale.request_id": request.x_request_id,
    }
    return tracer.start_span(f"{operation} {model}", parent(headers.get("traceparent")), SpanKind.SERVER, attributes)


class TracedGeneration(LoggedGeneration):
    """A `Generation` whose requests carry its span to the routers, and which ends it. Spans change nothing else."""

    def __init__(self, span: Span, router: RouterClient, requests: Sequence[GenerationRequest], **others: Any) -> None:
        self._span = span
        trace = traceparent(span)
        super().__init__(router, [replace(request, trace=trace) for request in requests], **others)

    async def aclose(self) -> None:
        """As of `Generation`; ends the span, once."""
        try:
            await super().aclose()
        finally:
            self._end()

    @harmless
    def _end(self) -> None:
        if self._span.is_recording():
            usage = self.usage()
            self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
            reasons = [each.finish_reason for each in self.choices if each.finish_reason is not None]
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
            if self._error is not None:  # as the log's line says: none that was got over, and no client that left
                fail(self._span, type(self._error).__name__)
            self._span.end()

"""The root of a trace: one span for each HTTP request that generates, named and labelled by the GenAI conventions.

It starts once the request has passed its checks, so one that was refused with a status of its own leaves none, and it
ends with the request's streams. Never a prompt, a text or a token. Conventions:
https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.telemetry import parent, traceparent
from deployments.generation import GenerationRequest
from deployments.ingress.account import AccountedGeneration
from deployments.ingress.choices import Delta
from deployments.ingress.clients import RouterClient

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def tracing(
    tracer: Tracer | None, headers: Mapping[str, str], *, model: str, id: str, chat: bool
) -> Callable[..., AccountedGeneration]:
    """What makes the `Generation` of a request: the class itself where traces are off."""
    return AccountedGeneration if tracer is None else partial(TracedGeneration, tracer, headers, model, id, chat)


class TracedGeneration(AccountedGeneration):
    """A `Generation` with a span from its making to its end. Its requests carry the span to the routers."""

    def __init__(
        self,
        tracer: Tracer,
        headers: Mapping[str, str],
        model: str,
        id: str,
        chat: bool,
        router: RouterClient,
        requests: Sequence[GenerationRequest],
        **others: Any,
    ) -> None:
        from opentelemetry.trace import SpanKind

        operation = "chat" if chat else "text_completion"
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "expertscale",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": id,
            "gen_ai.request.max_tokens": requests[0].sampling.max_tokens,
            "gen_ai.request.temperature": requests[0].sampling.temperature,
            "gen_ai.request.choice.count": requests[0].sampling.n,
            "expertscale.request_id": requests[0].x_request_id,
        }
        context = parent(headers.get("traceparent"))
        self._span = tracer.start_span(f"{operation} {model}", context, SpanKind.SERVER, attributes)
        trace = traceparent(self._span)
        super().__init__(router, [replace(request, trace=trace) for request in requests], **others)

    async def next(self) -> Delta | None:
        """As of `Generation`; an error becomes the span's."""
        try:
            return await super().next()
        except Exception as error:
            from opentelemetry.trace import Status, StatusCode

            # The class only: a message may quote what the client sent.
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise

    async def aclose(self) -> None:
        """As of `Generation`; ends the span, once."""
        try:
            await super().aclose()
        finally:
            if self._span.is_recording():
                usage = self.usage()
                self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
                self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
                reasons = [each.finish_reason for each in self.choices if each.finish_reason is not None]
                self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
                self._span.end()

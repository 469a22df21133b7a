"""Traces over OTLP (HTTP, protobuf): off, at no cost, unless the environment names an endpoint.

The OpenTelemetry variables say everything: OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT where to,
OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG how many. Spans leave in a thread of their own; where nobody takes them
they are dropped. The provider is ours alone: the global one, which Ray might use, is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

DEFAULT_RATIO = 0.01
"""Of the requests that come without a decision of their caller's."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

logger = logging.getLogger(__name__)


def tracer(service: str, attributes: Mapping[str, str], environ: Mapping[str, str]) -> Tracer | None:
    """The tracer of this process, or None where traces are off. Never raises: a setting it cannot read is logged.

    service: `service.name`. attributes: of the resource. environ: `os.environ`; whether traces are on is read from
    it, the rest by OpenTelemetry from the process's own.
    """
    if not any(environ.get(name) for name in _ENDPOINTS) or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    protocol = next((environ[name] for name in _PROTOCOLS if environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        logger.warning("traces are off: OTEL_EXPORTER_OTLP_PROTOCOL is %r, allowed is 'http/protobuf'", protocol)
        return None
    try:
        return _make(service, attributes, environ)
    except Exception:
        logger.exception("traces are off: their settings (OTEL_*) cannot be used")
        return None


def traceparent(span: Span) -> str:
    """The W3C header that continues a trace below `span`, or "" where the span is not sampled."""
    at = span.get_span_context()
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-01" if at.trace_flags.sampled else ""


def parent(header: str | None) -> Context:
    """The context that a `traceparent` header gives; one without a span where it is malformed."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # An explicit empty context: what Ray or a library made current in this thread is no parent of ours.
    carrier = {"traceparent": header} if header else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _make(service: str, attributes: Mapping[str, str], environ: Mapping[str, str]) -> Tracer:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    # None: the SDK reads OTEL_TRACES_SAMPLER itself.
    sampler = None if environ.get("OTEL_TRACES_SAMPLER") else ParentBasedTraceIdRatio(DEFAULT_RATIO)
    resource = Resource.create({"service.name": service, **attributes})
    provider = TracerProvider(sampler=sampler, resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("expertscale")

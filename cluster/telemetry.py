"""Traces over OTLP (HTTP, protobuf): off, at no cost, unless the environment names an endpoint.

The OpenTelemetry variables say everything: OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT where to,
OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG how many. Spans leave in a thread of their own; where nobody takes them
they are dropped. The provider is ours alone: the global one, which Ray might use, is left as it is.

Between processes a trace's context travels as a `traceparent` (HTTP, requests to routers) or packed in 24 bytes (the
header of a frame): the trace's id and the span below which to go on. Only contexts of sampled spans travel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

DEFAULT_RATIO = 0.01
"""Of the requests that come without a decision of their caller's."""
FLUSH_S = 1.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


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


def flush(tracer: Tracer | None) -> None:
    """Send what a process that leaves still has, for `FLUSH_S` at most: a collector may hang."""
    if tracer is not None:
        # In a thread: the SDK's own timeout does not end an export that hangs.
        sending = threading.Thread(target=_flush, args=(tracer,), daemon=True)
        sending.start()
        sending.join(FLUSH_S)


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


def packed(span: Span) -> bytes:
    """What continues a trace below `span`: 24 bytes, or b"" where the span is not sampled."""
    at = span.get_span_context()
    return at.trace_id.to_bytes(16, "big") + at.span_id.to_bytes(8, "big") if at.trace_flags.sampled else b""


def unpacked(trace: bytes) -> Context:
    """The context that `packed` made `trace` of."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    ids = int.from_bytes(trace[:16], "big"), int.from_bytes(trace[16:], "big")
    at = SpanContext(*ids, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(at), Context())


def fail(span: Span, reason: str) -> None:
    """Mark a span as failed. reason: a class of errors, and no message, which may quote what a client sent."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", reason)
    span.set_status(Status(StatusCode.ERROR, reason))


def harmless(method: Callable[Arguments, Made]) -> Callable[Arguments, Made | None]:
    """`method` for the data path: what it raises is logged, the first time, and None is what it returns then."""
    told = False

    @wraps(method)
    def quiet(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made | None:
        nonlocal told
        try:
            return method(*args, **kwargs)
        except Exception:
            if not told:
                told = True
                logger.exception("a span is lost, and maybe more of its kind, of which nothing will be said")
            return None

    return quiet


@harmless
def _flush(tracer: Any) -> None:
    tracer.span_processor.force_flush()


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

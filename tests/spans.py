"""Spans kept in this process, and the tree they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

PREFIX = "expertscale."


class KeptSpans:
    """A tracer that samples everything, and what it has been told. The exporter gets spans as they end."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def ended(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """In order of their start."""
        return sorted((span for span in self.ended if span.name == name), key=lambda span: span.start_time or 0)

    def tree(self, label: Callable[[ReadableSpan], str] = lambda span: span.name) -> list[str]:
        """One line a span, indented below its parent, in order of start; a span whose parent is not here is a root."""
        return _lines(self.ended, label)


def _lines(spans: Sequence[ReadableSpan], label: Callable[[ReadableSpan], str]) -> list[str]:
    order = sorted(spans, key=lambda span: span.start_time or 0)
    here = {span.context.span_id for span in spans}

    def below(parent: int | None, depth: int) -> list[str]:
        lines = []
        for span in order:
            above = span.parent.span_id if span.parent is not None and span.parent.span_id in here else None
            if above == parent:
                lines += ["  " * depth + label(span), *below(span.context.span_id, depth + 1)]
        return lines

    return below(None, 0)


def said(span: ReadableSpan) -> dict[str, Any]:
    """Its attributes, without the prefix of ours."""
    return {name.removeprefix(PREFIX): value for name, value in (span.attributes or {}).items()}


def milliseconds(span: ReadableSpan) -> tuple[float, float]:
    """(start, end) of a span whose wall clock is a scripted one that starts at 0."""
    return round((span.start_time or 0) / 1e6, 6), round((span.end_time or 0) / 1e6, 6)


class BrokenTracer:
    """Raises whatever it is asked."""

    def start_span(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no spans today")

"""The experts an answer used, for a request whose header asks: in its chunks, or in the whole. Knows no router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel

from cluster.errors import RequestError
from deployments.generation import Experts, GenerationRequest, union
from deployments.ingress.choices import Delta

EXPERTS_HEADER = "x-expertscale-experts"
KEY = "experts"

Shape = TypeVar("Shape", bound=BaseModel)


def asking(headers: Mapping[str, str], requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
    """The requests, told to show their experts where the header says so.

    Raises:
        RequestError: the header says neither true nor false.
    """
    said = headers.get(EXPERTS_HEADER, "false").strip().lower()
    if said not in ("true", "false"):
        message = f"The header {EXPERTS_HEADER} is {said[:40]!r}; use true or false."
        raise RequestError(message, EXPERTS_HEADER, "invalid_value")
    return [replace(request, show_experts=True) for request in requests] if said == "true" else requests


def with_experts(shape: Shape, deltas: Iterable[Delta]) -> Shape:
    """The answer or chunk with the experts of `deltas`, as they are known."""
    experts = union(*(delta.experts for delta in deltas))
    if experts is not None:
        # OpenAI's models keep fields they do not know, and its client shows them.
        setattr(shape, KEY, {str(layer): list(ids) for layer, ids in experts.items()})
    return shape


class Unsaid:
    """Experts of deltas that show nothing yet: they wait for the next chunk of their choice."""

    def __init__(self) -> None:
        self._waiting: dict[int, Experts | None] = {}

    def told(self, delta: Delta, chunks: list[BaseModel]) -> list[BaseModel]:
        """The chunks of `delta`, the first with all experts that no chunk has told."""
        experts = union(self._waiting.pop(delta.choice, None), delta.experts)
        if chunks:
            with_experts(chunks[0], [replace(delta, experts=experts)])
        elif experts is not None:
            self._waiting[delta.choice] = experts
        return chunks

"""Everything a route of the HTTP API needs, in one place; made once per Ingress replica, or by a test."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deployments.ingress.auth import Authenticator
from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.clients import ClusterClient, RouterClient
from deployments.ingress.limits import Limiter
from deployments.ingress.live import stays
from deployments.ingress.metering import RequestMetering

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


@dataclass(frozen=True)
class ServedModel:
    """The one model of this application as clients see it.

    max_context: prompt and completion tokens together. vocab_size: ids the model can read and emit.
    created: Unix seconds. fingerprint: `system_fingerprint` of responses, from the model digest.
    """

    name: str
    max_context: int
    vocab_size: int
    created: int
    fingerprint: str | None = None


@dataclass(frozen=True)
class Service:
    """max_body_bytes: larger bodies are answered 413. body_timeout_s: slower ones 408.

    request_timeout_s: from arrival to the last token; requests may ask for less. leaving: as in `Live`.
    tracer: None where traces are off.
    """

    model: ServedModel
    tokenizer: ChatTokenizer
    router: RouterClient
    cluster: ClusterClient
    auth: Authenticator = field(default_factory=Authenticator)
    limiter: Limiter = field(default_factory=lambda: Limiter(time.monotonic))
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    leaving: Callable[[], Awaitable[bool]] = stays
    tracer: Tracer | None = None
    metering: RequestMetering = field(default_factory=RequestMetering)

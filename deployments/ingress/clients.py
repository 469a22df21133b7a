"""What the Ingress needs of the rest of the cluster, as protocols: a router that generates, a cluster that reports.

The Serve shell implements them with handles; tests with fakes. Knows no Ray and no HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.generation import GenerationRequest, TokenChunk


class RouterClient(Protocol):
    """Sends one request to a router."""

    def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of every choice until each has a finish reason, or one error of `cluster.errors`.

        Closing the generator (or cancelling the task that waits in it) cancels the request on its router.
        session_id: requests that share it prefer the same router.
        """
        ...


@dataclass(frozen=True)
class Health:
    """What a request needs and nobody is ready for: "router", or names of expert groups.

    reasons: by the same names, why the last replica that tried could not start.
    degraded: what is wrong although requests can be answered, as of `cluster.health_reasons`: reason -> a sentence.
    """

    missing: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    degraded: Mapping[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Can a request be served now?"""
        return not self.missing


class ClusterClient(Protocol):
    """Asks the cluster about itself. Calls must answer within seconds or raise."""

    async def health(self) -> Health:
        """Which parts are missing."""
        ...

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster`, as the design fixes it."""
        ...

    async def loads(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster/loads`: a load file, as `cluster.placement.read_load` takes it."""
        ...

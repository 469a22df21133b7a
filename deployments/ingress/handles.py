"""The Ingress's way to routers and Directory over Serve handles; turns Ray's errors into ours. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.errors import ExpertScaleError, OverloadedError, RouterStoppingError
from cluster.serve_logging import about
from deployments.directory_client import ClusterReader
from deployments.generation import GenerationRequest, Pulse, TokenChunk
from deployments.ingress.clients import Health
from deployments.whereabouts import WHEREABOUTS, Whereabouts

logger = logging.getLogger(__name__)


class RouterHandle:
    """A `RouterClient` over the handle of the Router deployment.

    silence_s: a router that says nothing for longer, not even that it lives, hangs. A call that still waits for a
    router to have a place for it may wait for ever. vocabulary: which routers understand this Ingress, see
    `Blueprint`. whereabouts: written by the handle's request router.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        silence_s: float,
        vocabulary: str = "",
        whereabouts: Whereabouts = WHEREABOUTS,
    ) -> None:
        self._handle = handle.options(stream=True, method_name="generate")
        self._silence_s = silence_s
        self._vocabulary = vocabulary
        self._whereabouts = whereabouts

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one router's answer; closing the generator cancels the request there.

        Raises:
            OverloadedError: the handle's queue is full. RouterStoppingError: the router went away, or hangs.
            ExpertScaleError: whatever the router raised.
        """
        request = replace(request, vocabulary=self._vocabulary)
        stream = self._handle.options(session_id=session_id or "").remote(request)
        messages = aiter(stream)
        ended = False
        try:
            while (message := await self._next(messages, request.request_id)) is not None:
                self._whereabouts.heard(request.request_id)
                if not isinstance(message, Pulse):
                    yield message
            ended = True
        except HungError as error:
            self._avoid(request.request_id)
            raise RouterStoppingError(str(error)) from None
        except Exception as error:
            ended = True
            if isinstance(error, ActorDiedError | ActorUnavailableError):
                self._avoid(request.request_id)
            raise translated(error, request.x_request_id) from None
        finally:
            self._whereabouts.withdraw(request.request_id)
            if not ended:
                stream.cancel()

    async def _next(self, messages: AsyncIterator[TokenChunk | Pulse], request_id: str) -> TokenChunk | Pulse | None:
        """The next message, None at the end. Raises HungError, and what the call raises.

        Measured from when it is asked for: a reader that was slow to ask must not blame the router.
        """
        call = asyncio.ensure_future(_pull(messages))
        call.add_done_callback(_read)
        try:
            await self._listen(call, request_id)
            return call.result()
        finally:
            call.cancel()  # nobody will read what comes late

    def _avoid(self, request_id: str) -> None:
        if (placed := self._whereabouts.placed(request_id)) is not None:
            self._whereabouts.suspect(placed.router)

    async def _listen(self, call: asyncio.Future[Any], request_id: str) -> None:
        """Until `call` is done, or has been silent for too long since it was sent."""
        clock = asyncio.get_running_loop().time
        since_s = clock()
        while True:
            placed = self._whereabouts.placed(request_id)
            due_s = None if placed is None else max(placed.at_s, since_s) + self._silence_s
            timeout_s = self._silence_s if due_s is None else max(due_s - clock(), 0.0)
            done, _ = await asyncio.wait({call}, timeout=timeout_s)
            if done:
                return
            now_s = clock()
            if placed is None or due_s is None or now_s < due_s or self._whereabouts.placed(request_id) != placed:
                continue
            if now_s > due_s + self._silence_s / 2:
                since_s = now_s  # it was this process that stood still: what came meanwhile is still to be read
                continue
            raise HungError(f"The router {placed.router} has been silent for {self._silence_s:g} s.")


class HungError(Exception):
    """A router that has a request says nothing."""


async def _pull(messages: AsyncIterator[TokenChunk | Pulse]) -> TokenChunk | Pulse | None:
    return await anext(messages, None)


def _read(call: asyncio.Future[Any]) -> None:
    """An error that comes after the call was given up is nobody's concern; asyncio would log it."""
    if not call.cancelled():
        call.exception()


class DirectoryCluster:
    """A `ClusterClient` over the handle of the Directory."""

    def __init__(self, reader: ClusterReader) -> None:
        self._reader = reader

    async def health(self) -> Health:
        """Which parts are missing, and what is wrong besides."""
        (_, missing, reasons), degraded = await asyncio.gather(self._reader.health(), self._reader.degraded())
        return Health(tuple(missing), reasons, degraded)

    async def snapshot(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster`."""
        return await self._reader.snapshot()

    async def loads(self) -> dict[str, Any]:
        """The JSON of `GET /v1/cluster/loads`."""
        return await self._reader.loads()


def translated(error: Exception, request_id: str = "") -> Exception:
    """The error a client should see for what a call to a router raised; unknown ones stay as they are.

    request_id: `x-request-id`, for the log.
    """
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        # Ray wraps what the router raised in a class of its own making.
        error = error.cause
    if isinstance(error, ExpertScaleError):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError("Every router is busy and the queue is full; try again in a moment.")
    if isinstance(error, (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError)):
        logger.warning("a router went away in the middle of a request: %s", error, extra=about(request_id))
        return RouterStoppingError("The router that worked on this request went away; try again.")
    return error

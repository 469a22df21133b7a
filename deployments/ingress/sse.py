"""Server-sent events: one JSON object an event, then [DONE]; an error ends the stream in place of [DONE].

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, as OpenAI's streams use it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.ingress.disconnect import while_connected
from deployments.ingress.errors import ClientGoneError

DONE = b"data: [DONE]\n\n"


def event(value: BaseModel | dict[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so one `data:` line is enough."""
    if isinstance(value, BaseModel):
        return f"data: {value.model_dump_json(exclude_unset=True)}\n\n".encode()
    return f"data: {json.dumps(value)}\n\n".encode()


class EventStream(Response):
    """A response that sends `events` as they come and calls `close` at its end, whichever end it is.

    until_s: a client that has not read all by then is cut off, on the clock of the event loop. Behind Serve's proxy
    nothing is ever unsent here, so `close` is called when the work has ended, read or not: what is not read waits in
    Serve, until the client goes or `stalled.py`, in the proxy, cuts it off.

    Starlette's own StreamingResponse leaves its generator to the garbage collector when a client goes away while an
    event is being sent; here the work behind the stream must end at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        headers: dict[str, str],
        until_s: float,
    ) -> None:
        # no-transform and the nginx header: proxies should pass events on, not collect them.
        super().__init__(headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._until_s = until_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        try:
            async with asyncio.timeout_at(self._until_s):
                await while_connected(receive, self._send(send))
        except (ClientGoneError, OSError):  # a TimeoutError is one
            pass  # nobody is there to be told
        finally:
            try:
                await self._close()
            finally:
                await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

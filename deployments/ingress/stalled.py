"""Cuts off clients that do not read, inside Serve's HTTP proxy: the only place that sees what a client has not taken.

While a client does not read, the proxy asks the Ingress for no more. Without this it would wait for ever: engine and
key are free when the request has ended, but what is not read, and with it a place of the Ingress, stay held.
Imported by processes that serve no model (`proxy.py`): keep it light. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")  # the proxy's own log

STALLED_S = 30.0
VARIABLE = "EXPERTSCALE_STALLED_S"


def stalled_s() -> float:
    """Seconds a client may let a message wait: `VARIABLE` of the environment, else `STALLED_S`.

    Raises:
        ValueError: it holds no positive number.
    """
    text = os.environ.get(VARIABLE, str(STALLED_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"The variable {VARIABLE} should be a number of seconds above 0, not {text[:40]!r}.")
    return seconds


class CutOff:
    """Closes a connection whose client lets one message wait for longer than `stalled_s`.

    uvicorn lets a message wait while 64 KiB (its high-water mark) lie unsent behind full socket buffers, until they are
    16 KiB: who reads less than that in the time is cut off. To the proxy it is a client that went away.
    """

    def __init__(self, app: ASGIApp, stalled_s: float) -> None:
        self._app = app
        self._stalled_s = stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn's `send` is a method of what holds the connection; under another server nothing is cut off.
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        if transport is None:
            await self._app(scope, receive, send)
            return
        later = asyncio.get_running_loop().call_later

        async def watched(message: Message) -> None:
            watch = later(self._stalled_s, self._cut, transport)
            try:
                await send(message)
            finally:
                watch.cancel()

        await self._app(scope, receive, watched)

    def _cut(self, transport: Any) -> None:
        logger.warning("a client has not read for %g s: its connection is cut off", self._stalled_s)
        # Not `close`: that would wait until everything is read.
        transport.abort()

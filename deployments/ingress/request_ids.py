"""The id of an HTTP request: what its `x-request-id` header says, where that can be an id, else one made here.

Stands in two places. In Serve's proxy (`proxy.py`), before Serve reads the header: Serve's log lines, the Ingress, the
routers and the answer then all have one id. And around the Ingress's own application, for whoever runs that otherwise.
An id that is none is no error: whatever stands in front of a server may put anything there.

Imported by processes that serve no model: keep it light. Ids are told apart by nobody: two requests may have the same.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
MAX_CHARS = 128
_NAME = HEADER.encode()
# Nothing that could end a line of a log, or a field of one.
_ID = re.compile(rb"[!-~]{1,%d}" % MAX_CHARS)


class RequestIds:
    """Gives every request exactly one `x-request-id` header that holds an id.

    tell: whether to put it on the answers. Not where Serve's proxy stands outside, which does that itself.
    """

    def __init__(self, app: ASGIApp, *, tell: bool) -> None:
        self._app = app
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _NAME]
        # Several are none: Serve and others would each take another one.
        id = given[0] if len(given) == 1 and _ID.fullmatch(given[0]) else str(uuid.uuid4()).encode()
        others = [(name, value) for name, value in scope["headers"] if name != _NAME]

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = id.decode()
            await send(message)

        scope = {**scope, "headers": [*others, (_NAME, id)]}
        await self._app(scope, receive, telling if self._tell else send)


def request_id(headers: Mapping[str, str]) -> str:
    """The id of a request that has passed `RequestIds`; "" for one that has not."""
    return headers.get(HEADER, "")

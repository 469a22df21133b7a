"""Work that ends when the client goes away: an ASGI server reports that as a message nobody would otherwise read."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from deployments.ingress.errors import ClientGoneError

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end. Cancelling the caller cancels the work, as Serve does when a client goes away.

    Call it after the request's body was read.

    Raises:
        ClientGoneError: the client disconnected first; the work was cancelled and has ended.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and watch.exception() is not None:
            # The server cannot say whether the client is there: go on as if it were.
            await asyncio.wait({task})
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if task.cancelled():
        raise ClientGoneError
    return task.result()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

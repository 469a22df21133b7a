"""What the Directory's process does beside answering calls. Milliseconds."""

from __future__ import annotations

import asyncio
import contextvars
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import directory

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("REQUEST", default="nobody's")


def test_what_goes_on_for_ever_is_no_part_of_the_call_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve keeps a call's request id in its context, and stamps it on every line of the log from there."""
    monkeypatch.setattr(directory, "EXPIRY_PERIOD_S", 0)

    async def story() -> str:
        seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def expire() -> None:
            seen.set_result(REQUEST.get())
            await asyncio.Event().wait()

        kind: Any = directory.Directory
        each = object.__new__(kind.func_or_class)
        each._expiry, each._publishing = None, SimpleNamespace(start=lambda: None)
        each._core = SimpleNamespace(expire=expire)
        REQUEST.set("the caller's")
        each._ensure_expiry()
        try:
            return await asyncio.wait_for(seen, 10)
        finally:
            each._expiry.cancel()

    assert asyncio.run(story()) == "nobody's"

"""A replica that cannot start says why, in one sentence: to the Directory, and in the error that Serve shows.

One that is killed cannot say anything. So while it loads it says that it does, see `loading.py`.

Serve tries a version that has run before again and again, at growing intervals; a new one three times, and then keeps
what runs until the next deploy. Knows no weights, no torch and no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil

from cluster.errors import ExpertScaleError, ReplicaStartError
from cluster.stats import REASON_CHARS, StartFailure
from deployments.directory_client import background, call, cancel
from deployments.loading import BEAT_S, Loading

logger = logging.getLogger(__name__)

TELL_S = 5.0
"""The Directory may be starting itself."""
LAST_WORD_TRIES = 3
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


@asynccontextmanager
async def telling(directory: Any, *, part: str, deployment: str, digest: str) -> AsyncIterator[None]:
    """Whatever breaks in the block is told to the Directory and raised again. Until it ends the process says it loads.

    part, deployment, digest: as in `StartFailure`.

    Raises:
        ReplicaStartError: always the one; its message is the sentence.
    """
    beat = _Beat(directory, part, deployment, digest)
    speaking = background(beat.forever())
    try:
        yield
    except Exception as error:
        logger.exception("a replica of %s cannot start", deployment)
        reason = explanation(error, deployment)
        await cancel(speaking)
        failure = StartFailure(time.time(), part, deployment, reason, digest)
        # Both before this process ends: without its last word it would seem to have vanished, too.
        await asyncio.gather(_tell(directory, failure), beat.say(over=True))
        raise ReplicaStartError(reason) from None
    except BaseException:
        await cancel(speaking)
        beat.end()
        raise
    await cancel(speaking)
    beat.end()


async def _tell(directory: Any, failure: StartFailure) -> None:
    try:
        await call(directory.report_failure.remote(failure), TELL_S)
    except Exception as untold:
        logger.warning("the directory does not hear that %s cannot start: %r", failure.deployment, untold)


class _Beat:
    """The words of one start."""

    def __init__(self, directory: Any, part: str, deployment: str, digest: str) -> None:
        self._directory = directory
        self._whose = (part, deployment, digest)
        self._start = secrets.token_hex(8)
        self._n = 0
        self._ending: asyncio.Task[None] | None = None

    async def forever(self) -> None:
        """Say that it loads, at once and then every `BEAT_S`. The Directory may be down: the next word is as good."""
        while True:
            await self.say(over=False)
            await asyncio.sleep(BEAT_S)

    def end(self) -> None:
        """Say that loading is over. Nobody waits for it: the Directory may be down, and who can serve should."""
        self._ending = background(self._last_word())

    async def say(self, *, over: bool) -> bool:
        """Send one word; whether it was heard. Never raises."""
        self._n += 1
        try:
            await call(self._directory.report_loading.remote(self._word(over)), TELL_S)
        except Exception as unheard:
            logger.debug("the directory does not hear that %s loads: %r", self._whose[1], unheard)
            return False
        return True

    async def _last_word(self) -> None:
        for _ in range(LAST_WORD_TRIES):
            if await self.say(over=True):
                return
            await asyncio.sleep(BEAT_S)

    def _word(self, over: bool) -> Loading:
        part, deployment, digest = self._whose
        return Loading(
            start=self._start,
            n=self._n,
            time=time.time(),
            part=part,
            deployment=deployment,
            digest=digest,
            host=platform.node(),
            pid=os.getpid(),
            resident_bytes=psutil.Process().memory_info().rss,
            available_bytes=psutil.virtual_memory().available,
            over=over,
        )


def explanation(error: BaseException, deployment: str) -> str:
    """One sentence for people: what is wrong, and where."""
    if isinstance(error, ExpertScaleError):
        return _cut(f"{deployment} cannot start: {error}")
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # torch has a class of its own for a full GPU, but says the same of a full machine in a plain RuntimeError.
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        detail = f" ({text})" if text else ""
        return _cut(f"{deployment} cannot start: there is not enough memory{detail}.")
    return _cut(f"{deployment} cannot start: {type(error).__name__}: {text or 'no message'}")


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= REASON_CHARS else flat[: REASON_CHARS - 3] + "..."

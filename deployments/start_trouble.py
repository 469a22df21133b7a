"""A replica that cannot start says why, in one sentence: to the Directory, and in the error that Serve shows.

Serve tries a version that has run before again and again, at growing intervals; a new one three times, and then keeps
what runs until the next deploy. Knows no weights, no torch and no Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cluster.errors import ExpertScaleError, ReplicaStartError
from cluster.stats import REASON_CHARS, StartFailure
from deployments.directory_client import call

logger = logging.getLogger(__name__)

TELL_S = 5.0
"""The Directory may be starting itself."""
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


@asynccontextmanager
async def telling(directory: Any, *, part: str, deployment: str, digest: str) -> AsyncIterator[None]:
    """Whatever breaks in the block is told to the Directory and raised again.

    part, deployment, digest: as in `StartFailure`.

    Raises:
        ReplicaStartError: always the one; its message is the sentence.
    """
    try:
        yield
    except Exception as error:
        logger.exception("a replica of %s cannot start", deployment)
        reason = explanation(error, deployment)
        failure = StartFailure(time.time(), part, deployment, reason, digest)
        try:
            await call(directory.report_failure.remote(failure), TELL_S)
        except Exception as untold:
            logger.warning("the directory does not hear that %s cannot start: %r", deployment, untold)
        raise ReplicaStartError(reason) from None


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

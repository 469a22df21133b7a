"""How long a request may take: the least of what its body, its header and this server allow, from its arrival on.

    arrival ─────────────── at_s ──── gone_s ──── header's own end
             router and experts work   │            Serve's proxy cuts the connection, without a word
                                       the ingress no longer waits for the router to say that it is late

Serve's proxy obeys the header as well, by breaking off, so that what we have to say must be said before. Knows no
router and no JSON.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping

from cluster.errors import DeadlineError, RequestError
from deployments.ingress.schemas import MAX_TIMEOUT_S

HEADER = "x-request-timeout-seconds"
GRACE_S = 0.25
"""The router keeps the deadline between two steps, and says so; beyond this nobody waits for it."""
HEADER_MARGIN_S = 0.5


class Deadline:
    """Made when a request arrives; times are of the running event loop.

    started_s: when it was made. timeout_s: what was asked for, or allowed. at_s: when the work ends. gone_s: when the
    waiting ends.
    """

    def __init__(self, headers: Mapping[str, str], limit_s: float) -> None:
        """Raises RequestError: the header holds no number of seconds."""
        self.started_s = asyncio.get_running_loop().time()
        self.timeout_s = limit_s
        self._work_s = limit_s
        header_s = header_timeout_s(headers)
        if header_s is not None:
            self.shorten(header_s)
            self._work_s = min(self._work_s, header_s - min(HEADER_MARGIN_S, header_s / 5))

    def shorten(self, timeout_s: float | None) -> None:
        """The request allows no more than `timeout_s`; None for nothing of its own."""
        if timeout_s is not None:
            self.timeout_s = min(self.timeout_s, timeout_s)
            self._work_s = min(self._work_s, timeout_s)

    @property
    def at_s(self) -> float:
        """When router and experts stop."""
        return self.started_s + self._work_s

    @property
    def gone_s(self) -> float:
        """When a router that has not said so by itself is given up."""
        return self.at_s + min(GRACE_S, self._work_s / 10)

    def left_s(self) -> float:
        """Seconds until `at_s`. Raises DeadlineError when there are none."""
        left_s = self.at_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise self.error()
        return left_s

    def error(self) -> DeadlineError:
        """What the client is told."""
        return DeadlineError(f"The request did not finish within {self.timeout_s:g} s.")


def header_timeout_s(headers: Mapping[str, str]) -> float | None:
    """The header's seconds; None where it is absent. Raises RequestError where it is no such number."""
    text = headers.get(HEADER)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_TIMEOUT_S:
        message = f"The header {HEADER} should be a number of seconds above 0, at most {MAX_TIMEOUT_S}."
        raise RequestError(message, HEADER, "invalid_value")
    return value

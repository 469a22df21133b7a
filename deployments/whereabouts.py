"""Which Router replica each call of this process is at, and which replicas had better be left alone for a while.

Serve tells the caller neither, and waits for ever for a replica that was stopped before it accepted a call. So who
chooses the replica (`router/affinity.py`, called by Serve) writes the choice down here, and who waits for the answer
(the Ingress) reads it, and says when it has waited in vain. Knows no Ray.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

SUSPECT_S = 60.0
"""How long a silent replica is avoided: longer than Serve takes to replace one that does not answer health checks."""
MAX_CALLS = 16384
"""Calls remembered; the oldest are forgotten first. More than an Ingress replica accepts at once."""


@dataclass(frozen=True)
class Placed:
    """A call was sent to the replica `router` at `at_s`."""

    router: str
    at_s: float


class Whereabouts:
    """Calls by request id, suspected replicas by id. From any thread. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: dict[str, Placed] = {}
        self._suspects: dict[str, float] = {}

    def place(self, request_id: str, router: str) -> None:
        """The call was sent to `router`, now."""
        with self._lock:
            self._calls.pop(request_id, None)
            self._calls[request_id] = Placed(router, self._clock())
            while len(self._calls) > MAX_CALLS:
                del self._calls[next(iter(self._calls))]

    def withdraw(self, request_id: str) -> None:
        """The call ended, or waits for a place again."""
        with self._lock:
            self._calls.pop(request_id, None)

    def placed(self, request_id: str) -> Placed | None:
        """Where the call is; None while it waits for a place."""
        with self._lock:
            return self._calls.get(request_id)

    def suspect(self, router: str) -> None:
        """The replica has been silent for too long."""
        with self._lock:
            self._suspects[router] = self._clock()

    def heard(self, request_id: str) -> None:
        """The call got an answer: its replica is no suspect, if it was asked after it had become one.

        What an earlier call gets proves nothing: it may have been sent before the silence, and read late.
        """
        with self._lock:
            call = self._calls.get(request_id)
            if call is not None and call.at_s > self._suspects.get(call.router, call.at_s):
                del self._suspects[call.router]

    def suspects(self) -> frozenset[str]:
        """Replicas to avoid while there are others."""
        with self._lock:
            oldest = self._clock() - SUSPECT_S
            self._suspects = {router: since for router, since in self._suspects.items() if since > oldest}
            return frozenset(self._suspects)


WHEREABOUTS = Whereabouts()
"""Of this process. Serve makes the request router from an import string, out of reach of whoever made the handle."""

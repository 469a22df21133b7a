"""How long to leave the API server alone after a failure: longer each time, and long where only a person can help."""

from __future__ import annotations

from cluster.nodes.api import ForbiddenTrouble

FIRST_S, LONGEST_S = 1.0, 60.0
FORBIDDEN_S = 300.0
"""After a refusal that lasts until somebody changes a role."""


class Backoff:
    """1, 2, 4 ... 60 s, until something succeeds."""

    def __init__(self) -> None:
        self._failures = 0

    def succeeded(self) -> None:
        """Begin anew."""
        self._failures = 0

    def failed(self, kind: type[Exception]) -> float:
        """-> seconds to wait."""
        self._failures += 1
        if issubclass(kind, ForbiddenTrouble):
            return FORBIDDEN_S
        return min(LONGEST_S, FIRST_S * 2.0 ** min(10, self._failures - 1))

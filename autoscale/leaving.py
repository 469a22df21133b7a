"""Replicas that nobody asks for any more and that still hold their device: what a budget must not count as free. Pure.

Serve's contexts count running replicas only, and a cancelled start is in no count at all. What is known for certain are
the instance details of the controller, read now and then; what was taken back since is added until they show it.

    time ──────────●────────────────●──────────────────────●────────> now
               details read     2 taken back           details read
    leaving       1                 1 + 2                whatever these say
"""

from __future__ import annotations

from collections.abc import Mapping

MARGIN_S = 1.0
"""How long Serve may take to act on a decision: details read sooner after it may not show it yet."""


class Leaving:
    """Counts, per unit. Times are of one clock; a clock that jumps back only makes the counts larger for a while."""

    def __init__(self) -> None:
        self._seen: Mapping[str, int] = {}
        self._seen_at = float("-inf")
        self._taken_back: list[tuple[float, str, int]] = []

    def details(self, stopping: Mapping[str, int], asked_at: float) -> None:
        """What the controller says: unit -> replicas that are stopping, asked for at `asked_at`."""
        self._seen, self._seen_at = dict(stopping), asked_at
        self._taken_back = [entry for entry in self._taken_back if entry[0] > asked_at - MARGIN_S]

    def taken_back(self, unit: str, replicas: int, now: float) -> None:
        """A target was lowered by `replicas`."""
        self._taken_back.append((now, unit, replicas))

    def count(self, unit: str) -> int:
        """Replicas of `unit` that may still hold a device although they are not asked for."""
        return self._seen.get(unit, 0) + sum(n for _, name, n in self._taken_back if name == unit)

    @property
    def any(self) -> bool:
        """Whether anything may be leaving, so that details are worth reading soon."""
        return bool(self._taken_back) or any(self._seen.values())

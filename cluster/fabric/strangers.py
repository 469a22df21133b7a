"""How much trouble an address may make before its connections are closed without a word.

Trouble is a connection that ends before it has proved the cluster key. Each address has a few of them free, and earns
new ones slowly (a token bucket); who has none left is turned away at accept, which costs the server a hundredth of a
handshake. An address that has proved the key is never turned away: there may be strangers beside a router, on a shared
node or behind one gateway, and what they cost is bounded by `ServerLimits.strangers` all the same. Unix sockets have no
address and are never turned away: only this user can reach them. Pure; time is passed in.
"""

from __future__ import annotations

from typing import TypeVar

FREE, EARNED_PER_S = 20.0, 1.0
ADDRESSES = 1024
"""Remembered at most; the longest quiet one makes room."""
Value = TypeVar("Value")


class Strangers:
    """One server's memory of addresses."""

    def __init__(self, free: float = FREE, earned_per_s: float = EARNED_PER_S, addresses: int = ADDRESSES) -> None:
        self._free = free
        self._earned_per_s = earned_per_s
        self._addresses = addresses
        # In order of their last entry. (what is left, as of when)
        self._left: dict[str, tuple[float, float]] = {}
        self._proved: dict[str, None] = {}

    def admits(self, address: str, now: float) -> bool:
        """Whether a connection from `address` may try to prove the key."""
        return not address or self._left_now(address, now) >= 1.0

    def proved(self, address: str) -> None:
        """A router connected from there."""
        if address:
            _enter(self._proved, address, None, self._addresses)
            self._left.pop(address, None)

    def troubled(self, address: str, now: float) -> None:
        """A connection from there ended unproved."""
        if address and address not in self._proved:
            left = max(0.0, self._left_now(address, now) - 1.0)
            _enter(self._left, address, (left, now), self._addresses)

    def _left_now(self, address: str, now: float) -> float:
        left, at_s = self._left.get(address, (self._free, now))
        return min(self._free, left + self._earned_per_s * (now - at_s))


def _enter(entries: dict[str, Value], key: str, value: Value, most: int) -> None:
    entries.pop(key, None)
    entries[key] = value
    if len(entries) > most:
        del entries[next(iter(entries))]

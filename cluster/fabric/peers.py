"""What one router knows about the replicas it may send rows to: load, speed, and whom to avoid after a failure.

Belongs to the thread that dispatches; time is passed in. Knows no transport. What a directory says comes as a `View`;
what experience says comes through `answered` and `failed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fabric.balance import Candidate
from cluster.membership import Replica, State, View

FIRST_HOP_S = 2e-4
"""A round trip's guess before the first is measured: a Unix socket on a small machine."""
HOP_CREEP = 0.02
"""The hop is the shortest round trip lately seen: it falls at once and creeps up by this part of the difference."""
SPEED_GAIN = 0.2
RETRY_S, RETRY_MAX_S = 0.1, 2.0
"""After a failure: how soon the replica is asked again where there is nobody else, doubling with every failure."""
AVOID_S, AVOID_MAX_S = 5.0, 60.0
"""After a failure: how long the replica is left alone while there is somebody else, doubling with every failure."""
NEVER = float("-inf")


@dataclass(slots=True)
class Peer:
    """One replica as this router experiences it.

    in_flight_rows: sent and not answered. reason: why it failed last; "" when its last answer was good.
    """

    replica: Replica
    speed_rows_per_s: float
    hop_s: float = FIRST_HOP_S
    in_flight_rows: int = 0
    rows: int = 0
    failures: int = 0
    reason: str = ""
    _queue_rows: int = 0
    _queue_at_s: float = NEVER
    _avoid_until_s: float = NEVER
    retry_at_s: float = NEVER

    def candidate(self, now: float) -> Candidate:
        """Load and speed at `now`. The queue it reported is assumed to have drained at its speed since."""
        speed = self.speed_rows_per_s
        queued = max(0.0, self._queue_rows - speed * (now - self._queue_at_s)) if self._queue_rows else 0.0
        return Candidate(self.in_flight_rows + queued, speed)

    def is_avoided(self, now: float) -> bool:
        """Whether others are to be preferred at `now`."""
        return now < self._avoid_until_s

    def answered(
        self, rows: int, round_trip_s: float, compute_s: float, queue_rows: int, now: float, *, exact: bool = True
    ) -> None:
        """`rows` came back after `round_trip_s`, of which the replica computed `compute_s`.

        exact: the answer was taken when it came; otherwise it may have lain there, and the round trip was no longer.
        """
        self.rows += rows
        self.failures = 0
        self.reason = ""
        self._avoid_until_s = self.retry_at_s = NEVER
        self._queue_rows, self._queue_at_s = queue_rows, now
        hop_s = max(round_trip_s - compute_s, 0.0)
        if hop_s < self.hop_s:
            self.hop_s = hop_s
        elif exact:
            self.hop_s += HOP_CREEP * (hop_s - self.hop_s)
        # Below a hop the fixed costs of a call are measured, not the speed of the device.
        if compute_s > self.hop_s:
            self.speed_rows_per_s += SPEED_GAIN * (rows / compute_s - self.speed_rows_per_s)

    def failed(self, reason: str, now: float) -> None:
        """It could not be reached, refused us or fell silent."""
        doubled = 2.0 ** min(self.failures, 30)
        self.failures += 1
        self.reason = reason
        self.retry_at_s = now + min(RETRY_S * doubled, RETRY_MAX_S)
        self._avoid_until_s = now + min(AVOID_S * doubled, AVOID_MAX_S)


class Peers:
    """The peers of all groups, as of one view."""

    def __init__(self) -> None:
        self._view: View | None = None
        self._ready: dict[str, tuple[Peer, ...]] = {}
        self.by_id: dict[str, Peer] = {}

    def adopt(self, view: View) -> bool:
        """Take over a view; peers that stay keep what is known of them. False where it is the view already adopted."""
        if view is self._view:
            return False
        peers: dict[str, Peer] = {}
        ready: dict[str, list[Peer]] = {}
        for replica in view.replicas:
            peer = self.by_id.get(replica.id)
            if peer is None:
                # A replica that reports no speed must not divide by zero; the first answers correct the guess.
                peer = Peer(replica, replica.speed_rows_per_s if replica.speed_rows_per_s > 0 else 1.0)
            peer.replica = replica
            peers[replica.id] = peer
            if replica.state is State.READY:
                ready.setdefault(replica.group, []).append(peer)
        # Replaced as a whole: statistics are read from other threads.
        self.by_id = peers
        self._ready = {group: tuple(members) for group, members in ready.items()}
        self._view = view
        return True

    def usable(self, group: str, now: float) -> Sequence[Peer]:
        """The ready peers of `group` that have not failed lately; if none, those whose time for a retry has come."""
        ready = self._ready.get(group, ())
        if len(ready) == 1:
            return ready if now >= ready[0].retry_at_s else ()
        good = [peer for peer in ready if not peer.is_avoided(now)]
        return good or [peer for peer in ready if now >= peer.retry_at_s]

    def next_retry_s(self, group: str) -> float | None:
        """When the first ready peer of `group` may be asked again; None where there is none."""
        return min((peer.retry_at_s for peer in self._ready.get(group, ())), default=None)

    def reasons(self, group: str) -> str:
        """Why no peer of `group` is usable, for an error message."""
        ready = self._ready.get(group, ())
        if not ready:
            return "no replica is ready"
        return "; ".join(f"{peer.replica.id}: {peer.reason or 'no answer yet'}" for peer in ready)

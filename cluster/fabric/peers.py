"""What one router knows about the replicas it may send rows to: load, speed, and whom to avoid after a failure.

Belongs to the thread that dispatches; time is passed in. Knows no transport. What a directory says comes as a `View`;
what experience says comes through `answered`, `caught_up` and `failed`.

How slow a replica is shows in two ways: in the time it says to have computed (`speed_rows_per_s`), and in the rest of
the round trip (`delay_s`), which nobody reports. A smoothed mean with a smoothed deviation of the rest is what TCP
keeps of a round trip (Jacobson 1988).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fabric.balance import Candidate
from cluster.membership import Replica, State, View

FIRST_HOP_S = 2e-4
"""A round trip's guess before the first is measured: a Unix socket on a small machine."""
HOP_CREEP = 0.02
"""The hop is the shortest round trip lately seen: it falls at once and creeps up by this part of the difference."""
SPEED_GAIN = 0.2
DELAY_GAIN, DELAY_FALL = 0.2, 0.5
LATE_GAIN = 0.5
LAG_FLOOR_S, LAG_TIMES = 0.002, 3.0
"""A delay counts against a replica from these times the shortest of its group and so much more: below is noise."""
LEAST_DELAY_S = 1e-6
SPREADS = 2.0
SLOW_SHARE = 0.8
"""Slower than this part of what was announced, in proportion to the best of the group: worth a probe."""
RETRY_S, RETRY_MAX_S = 0.1, 2.0
"""After a failure: how soon the replica is asked again where there is nobody else, doubling with every failure."""
AVOID_S, AVOID_MAX_S = 5.0, 60.0
"""After a failure: how long the replica is left alone while there is somebody else, doubling with every failure."""
NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class Peer:
    """One replica as this router experiences it.

    in_flight_rows: sent and not answered. reason: why it failed last; "" when its last answer was good.
    delay_s, spread_s: the round trip less computation and queue, and its deviation. late: batches that were overtaken
    and are not answered. probed: a probe is not answered. overtaken: batches that others answered sooner, in all.
    """

    replica: Replica
    speed_rows_per_s: float
    announced_rows_per_s: float = 1.0
    hop_s: float = FIRST_HOP_S
    delay_s: float = FIRST_HOP_S
    spread_s: float = 0.0
    in_flight_rows: int = 0
    rows: int = 0
    failures: int = 0
    reason: str = ""
    late: int = 0
    overtaken: int = 0
    probed: bool = False
    asked_s: float = NEVER
    _queue_rows: int = 0
    _queue_at_s: float = NEVER
    _avoid_until_s: float = NEVER
    retry_at_s: float = NEVER

    def load_rows(self, now: float) -> float:
        """Rows before the next ones at `now`. The queue it reported is assumed to have drained at its speed since."""
        if not self._queue_rows:
            return self.in_flight_rows
        return self.in_flight_rows + max(
            0.0, self._queue_rows - self.speed_rows_per_s * max(0.0, now - self._queue_at_s)
        )

    def usual_s(self, rows: int, now: float) -> float:
        """How long this replica would usually take for `rows` more, sent at `now`."""
        return self.delay_s + SPREADS * self.spread_s + (self.load_rows(now) + rows) / self.speed_rows_per_s

    @property
    def fitness(self) -> float:
        """Measured speed in proportion to what it announced."""
        return self.speed_rows_per_s / self.announced_rows_per_s

    def is_avoided(self, now: float) -> bool:
        """Whether others are to be preferred at `now` after a failure."""
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
        delay_s = round_trip_s - compute_s if round_trip_s > compute_s else 0.0
        hop_s = self.hop_s
        if delay_s < hop_s:
            self.hop_s = hop_s = delay_s
        elif exact:
            self.hop_s = hop_s = hop_s + HOP_CREEP * (delay_s - hop_s)
        # Below a hop the fixed costs of a call are measured, not the speed of the device.
        if compute_s > hop_s:
            self.speed_rows_per_s += SPEED_GAIN * (rows / compute_s - self.speed_rows_per_s)
        if queue_rows:  # where a queue is left there was one before, and it is in the load already
            delay_s = max(delay_s - queue_rows / self.speed_rows_per_s, 0.0)
        miss_s = delay_s - self.delay_s
        if miss_s < 0.0:
            self.delay_s += DELAY_FALL * miss_s
            self.spread_s -= DELAY_GAIN * (miss_s + self.spread_s)
        elif exact:
            self.delay_s += DELAY_GAIN * miss_s
            self.spread_s += DELAY_GAIN * (miss_s - self.spread_s)

    def caught_up(self, rows: int, round_trip_s: float, compute_s: float, queue_rows: int, now: float) -> None:
        """The answer to a batch that was overtaken or only probed: there are few of them, so each counts for more.

        Means are taken in orders of magnitude where they span several: a delay of 5 s is forgotten after three of
        1 ms, not after eleven, and one computation ten times as slow leaves a fifth of the speed, not half.
        """
        before_s, spread_s, speed = self.delay_s, self.spread_s, self.speed_rows_per_s
        self.answered(0, round_trip_s, compute_s, queue_rows, now)
        delay_s = max(round_trip_s - compute_s - queue_rows / speed, LEAST_DELAY_S)
        self.spread_s = spread_s + LATE_GAIN * (abs(delay_s - before_s) - spread_s)
        if delay_s < before_s:
            self.delay_s = math.sqrt(before_s * delay_s)
        else:
            self.delay_s = before_s + LATE_GAIN * (delay_s - before_s)
        # No lower than that, where it computed for less than a hop: enough to know that it is no longer slow.
        least = rows / max(compute_s, self.hop_s, 1e-9)
        if least > speed:
            self.speed_rows_per_s = speed + LATE_GAIN * (least - speed)
        elif compute_s > self.hop_s:
            self.speed_rows_per_s = 1.0 / ((1.0 - LATE_GAIN) / speed + LATE_GAIN / least)
        else:
            self.speed_rows_per_s = speed

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
        leaving: dict[str, list[Peer]] = {}
        for replica in view.replicas:
            # A replica that reports no speed must not divide by zero; the first answers correct the guess.
            announced = replica.speed_rows_per_s if replica.speed_rows_per_s > 0 else 1.0
            peer = self.by_id.get(replica.id)
            if peer is None:
                peer = Peer(replica, announced)
            peer.replica, peer.announced_rows_per_s = replica, announced
            peers[replica.id] = peer
            if replica.state is State.READY:
                ready.setdefault(replica.group, []).append(peer)
            elif replica.state is State.DRAINING:
                leaving.setdefault(replica.group, []).append(peer)
        # Replaced as a whole: statistics are read from other threads.
        self.by_id = peers
        # Those that leave go on serving as long as there is nobody else: in a rollout, the old experts.
        self._ready = {group: tuple(members) for group, members in (leaving | ready).items()}
        self._view = view
        return True

    def ready(self, group: str) -> Sequence[Peer]:
        """All ready peers of `group`, however they fare."""
        return self._ready.get(group, ())

    def good(self, group: str, now: float) -> list[Peer]:
        """The ready peers of `group` that have not failed lately and owe no answer that was overtaken."""
        return [peer for peer in self._ready.get(group, ()) if not peer.late and now >= peer._avoid_until_s]

    def usable(self, group: str, now: float) -> Sequence[Peer]:
        """The good peers of `group`; if none, those that are late; if none, those whose time for a retry has come."""
        ready = self._ready.get(group, ())
        if len(ready) == 1:
            return ready if now >= ready[0].retry_at_s else ()
        return (
            self.good(group, now)
            or [peer for peer in ready if not peer.is_avoided(now)]
            or [peer for peer in ready if now >= peer.retry_at_s]
        )

    def next_retry_s(self, group: str) -> float | None:
        """When the first ready peer of `group` may be asked again; None where there is none."""
        return min((peer.retry_at_s for peer in self._ready.get(group, ())), default=None)

    def reasons(self, group: str) -> str:
        """Why no peer of `group` is usable, for an error message."""
        ready = self._ready.get(group, ())
        if not ready:
            return "no replica is ready"
        return "; ".join(f"{peer.replica.id}: {peer.reason or 'no answer yet'}" for peer in ready)


def lag_limit_s(peers: Sequence[Peer]) -> float:
    """The delay from which one of `peers`, all of a group, counts as slow."""
    return LAG_FLOOR_S + LAG_TIMES * min([peer.delay_s for peer in peers])


def candidates(peers: Sequence[Peer], now: float) -> list[Candidate]:
    """Load and speed of `peers`, several of one group, at `now`. What a slow one lags behind counts as load."""
    limit_s = lag_limit_s(peers)
    found = []
    for peer in peers:
        load: float = peer.load_rows(now) if peer._queue_rows else peer.in_flight_rows
        if peer.delay_s > limit_s:
            load += (peer.delay_s - limit_s) * peer.speed_rows_per_s
        found.append(Candidate(load, peer.speed_rows_per_s))
    return found


def slow_ones(peers: Sequence[Peer]) -> list[Peer]:
    """Those of `peers`, all of a group, that are chosen less because they were found slow, not because they said so."""
    limit_s = lag_limit_s(peers)
    fit = SLOW_SHARE * max(peer.fitness for peer in peers)
    return [peer for peer in peers if peer.delay_s > limit_s or peer.fitness < fit]

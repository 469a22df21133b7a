"""Who serves what: the life of expert replicas, joining > ready > draining > gone, and the view routers get of it.

Pure: time is passed in, nothing is sent from here. The Directory deployment wraps one `Membership`.

Epoch: (incarnation, n). n rises by one with every change a router must know of. A restarted Directory has a new
incarnation; replicas fill it again by their heartbeats, and routers keep their last view meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """Where a replica is in its life. It only ever moves forward."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"


_ORDER = {State.JOINING: 0, State.READY: 1, State.DRAINING: 2}

KEPT_GONE = 1000
"""Ids of replicas that have left are remembered for so many: a report overtaken by a farewell is seconds old."""

SUSPICIONS = 2
"""Complaints that, without a heartbeat in between, shorten the time a silent replica is given."""


@dataclass(frozen=True)
class Address:
    """Where a replica listens: a Unix socket for its own node, TCP for others."""

    node: str
    unix_path: str
    host: str
    port: int


@dataclass(frozen=True)
class Replica:
    """One copy of a group as routers see it.

    speed_rows_per_s: measured at warm-up (or emulated), rows of one layer per second.
    digest: the model digest in hex; a router refuses a replica with another one.
    """

    id: str
    group: str
    pool: str
    address: Address
    digest: str
    speed_rows_per_s: float
    state: State = State.JOINING


@dataclass(frozen=True)
class Epoch:
    """Version of a view. n has an order only within one incarnation, incarnations have none."""

    incarnation: str
    n: int


@dataclass(frozen=True)
class View:
    """Everything a router needs to choose replicas. `replicas` holds joining, ready and draining ones, by id."""

    epoch: Epoch
    replicas: tuple[Replica, ...] = ()

    def ready(self, group: str) -> tuple[Replica, ...]:
        """The replicas of `group` that take new rows."""
        return tuple(r for r in self.replicas if r.group == group and r.state is State.READY)

    def of(self, digest: str) -> View:
        """The same view without replicas of other models, whom nobody of this one may send rows to."""
        return View(self.epoch, tuple(r for r in self.replicas if r.digest == digest))

    def missing(self, groups: Collection[str]) -> tuple[str, ...]:
        """The groups nobody is ready for."""
        present = {r.group for r in self.replicas if r.state is State.READY}
        return tuple(group for group in groups if group not in present)


@dataclass
class Membership:
    """The registry itself.

    Invariants: an id occurs once; states only move forward; `epoch.n` rises exactly when `view()` changes.

    heartbeat_timeout_s: a replica unheard of for longer is gone.
    suspect_timeout_s: the same for one that routers have complained of since it was last heard.
    """

    incarnation: str
    heartbeat_timeout_s: float = 10.0
    suspect_timeout_s: float = 2.0
    _replicas: dict[str, Replica] = field(default_factory=dict)
    _heard_s: dict[str, float] = field(default_factory=dict)
    _complaints: dict[str, int] = field(default_factory=dict)
    _gone: dict[str, None] = field(default_factory=dict)
    _n: int = 0

    def report(self, replica: Replica, now: float) -> bool:
        """A replica says what it is: registration and heartbeat in one, so a restarted Directory fills by itself.

        Returns False where the id has already left, or belongs to a replica of something else; such a replica must
        stop (ids are never used again).
        """
        known = self._replicas.get(replica.id)
        if replica.id in self._gone or (known is not None and _identity(known) != _identity(replica)):
            return False
        self._heard_s[replica.id] = max(now, self._heard_s.get(replica.id, now))
        self._complaints.pop(replica.id, None)
        # A report with an earlier state was overtaken on its way: all it says is older than what is known.
        overtaken = known is not None and _ORDER[replica.state] < _ORDER[known.state]
        if known != replica and not overtaken:
            self._replicas[replica.id] = replica
            self._n += 1
        return True

    def suspect(self, replica_id: str) -> None:
        """A router cannot reach this replica. Only a hint: the next heartbeat takes it back."""
        if replica_id in self._replicas:
            self._complaints[replica_id] = self._complaints.get(replica_id, 0) + 1

    def leave(self, replica_id: str) -> None:
        """The replica is gone by its own word, for good, even where it was never heard of. Idempotent."""
        self._gone[replica_id] = None
        if len(self._gone) > KEPT_GONE:
            del self._gone[next(iter(self._gone))]
        self._remove(replica_id)

    def expire(self, now: float) -> list[str]:
        """Remove every replica unheard of for longer than its timeout; returns their ids.

        An expired replica may come back (it was slow, not dead): its next report registers it again.
        """
        late = [rid for rid, heard in self._heard_s.items() if now - heard > self._timeout_s(rid)]
        for replica_id in late:
            self._remove(replica_id)
        return late

    def view(self) -> View:
        """The current view, replicas in order of id."""
        replicas = tuple(self._replicas[rid] for rid in sorted(self._replicas))
        return View(self.epoch, replicas)

    @property
    def epoch(self) -> Epoch:
        """The version of `view()`."""
        return Epoch(self.incarnation, self._n)

    def _timeout_s(self, replica_id: str) -> float:
        suspected = self._complaints.get(replica_id, 0) >= SUSPICIONS
        return min(self.suspect_timeout_s, self.heartbeat_timeout_s) if suspected else self.heartbeat_timeout_s

    def _remove(self, replica_id: str) -> None:
        self._heard_s.pop(replica_id, None)
        self._complaints.pop(replica_id, None)
        if self._replicas.pop(replica_id, None) is not None:
            self._n += 1


def _identity(replica: Replica) -> tuple[str, str, str]:
    return replica.group, replica.pool, replica.digest

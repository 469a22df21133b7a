"""Who serves what: the life of expert replicas, joining > ready > draining > gone, and the view routers get of it.

Pure: time is passed in, nothing is sent from here. The Directory deployment wraps one `Membership`.

Epoch: (incarnation, n). n rises by one with every change a router must know of. A restarted Directory has a new
incarnation; replicas fill it again by their heartbeats, and routers keep their last view meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum


class State(StrEnum):
    """Where a replica is in its life. It only ever moves forward."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"


_ORDER = {State.JOINING: 0, State.READY: 1, State.DRAINING: 2}


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


@dataclass(frozen=True, order=True)
class Epoch:
    """Version of a view; comparable only within one incarnation."""

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

    def missing(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """The groups nobody is ready for."""
        present = {r.group for r in self.replicas if r.state is State.READY}
        return tuple(group for group in groups if group not in present)


@dataclass
class Membership:
    """The registry itself.

    Invariants: an id occurs once; states only move forward; `epoch.n` rises exactly when `view()` changes.

    heartbeat_timeout_s: a replica unheard of for longer is gone.
    """

    incarnation: str
    heartbeat_timeout_s: float = 10.0
    _replicas: dict[str, Replica] = field(default_factory=dict)
    _heard_s: dict[str, float] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)
    _n: int = 0

    def report(self, replica: Replica, now: float) -> bool:
        """A replica says what it is: registration and heartbeat in one, so a restarted Directory fills by itself.

        Returns False where the id has already left; such a replica must stop (ids are never used again).
        """
        if replica.id in self._gone:
            return False
        known = self._replicas.get(replica.id)
        if known is not None and _ORDER[replica.state] < _ORDER[known.state]:
            replica = replace(replica, state=known.state)
        self._heard_s[replica.id] = now
        if known != replica:
            self._replicas[replica.id] = replica
            self._n += 1
        return True

    def leave(self, replica_id: str) -> None:
        """The replica is gone, by its own word or because nothing was heard of it. Idempotent."""
        self._gone.add(replica_id)
        if self._replicas.pop(replica_id, None) is not None:
            self._heard_s.pop(replica_id, None)
            self._n += 1

    def expire(self, now: float) -> list[str]:
        """Remove every replica unheard of for longer than the timeout; returns their ids.

        An expired replica may come back (it was slow, not dead): its next report registers it again.
        """
        late = [rid for rid, heard in self._heard_s.items() if now - heard > self.heartbeat_timeout_s]
        for replica_id in late:
            self.leave(replica_id)
            self._gone.discard(replica_id)
        return late

    def view(self) -> View:
        """The current view, replicas in order of id."""
        replicas = tuple(self._replicas[rid] for rid in sorted(self._replicas))
        return View(Epoch(self.incarnation, self._n), replicas)

"""Connections that are being opened beside the dispatching thread, one thread each for as long as that takes.

A hung replica accepts a connection (the system does, for it) and never answers the handshake: waiting for that would
stop every other group. Belongs to the dispatching thread; the threads it starts touch nothing but their own `_Opening`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

from cluster.errors import FabricError, ReplicaLostError
from cluster.fabric.links import Link
from cluster.membership import Replica

Open = Callable[[Replica], Link]


class _Opening:
    """One attempt. Whoever comes last, the thread or `abandon`, closes a link that nobody wants."""

    def __init__(self, replica: Replica, open_: Open) -> None:
        self.began_s = time.monotonic()
        self.ended = threading.Event()
        self._replica = replica
        self._open = open_
        self._lock = threading.Lock()
        self._abandoned = False
        self._link: Link | None = None
        self._error: FabricError | None = None
        threading.Thread(target=self._run, name=f"open-{replica.id}", daemon=True).start()

    def result(self) -> Link:
        """The link, once `ended` is set.

        Raises:
            FabricError: what `open_link` raised.
        """
        if self._link is None:
            raise self._error or ReplicaLostError(f"{self._replica.id} could not be connected to.")
        return self._link

    def abandon(self) -> None:
        """Nobody wants the link any more."""
        with self._lock:
            self._abandoned = True
            link = self._link
        if link is not None:
            link.close()

    def _run(self) -> None:
        link: Link | None = None
        try:
            link = self._open(self._replica)
        except FabricError as error:
            self._error = error
        except Exception as error:
            self._error = ReplicaLostError(f"{self._replica.id} cannot be connected to: {error}.")
        with self._lock:
            self._link = link
            unwanted = self._abandoned
        if unwanted and link is not None:
            link.close()
        self.ended.set()


class Openings:
    """At most one attempt per replica."""

    def __init__(self) -> None:
        self._openings: dict[str, _Opening] = {}

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._openings

    def take(self, replica: Replica, patience_s: float, open_: Open) -> Link | None:
        """The link to `replica`, which is the caller's from now on; None where it is not open `patience_s` after the
        attempt began. Begins one if there is none.

        Raises:
            FabricError: the attempt failed; the next call begins another one.
        """
        opening = self._openings.get(replica.id)
        if opening is None:
            opening = self._openings[replica.id] = _Opening(replica, open_)
        if not opening.ended.wait(max(0.0, opening.began_s + patience_s - time.monotonic())):
            return None
        del self._openings[replica.id]
        return opening.result()

    def retain(self, replica_ids: Collection[str]) -> None:
        """Give up all attempts but those for these."""
        for replica_id in set(self._openings).difference(replica_ids):
            self._openings.pop(replica_id).abandon()

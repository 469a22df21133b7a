"""The stream transport: one persistent connection per replica, Unix socket on one node, TCP between nodes.

Sends never block: what a socket does not take is sent while waiting, so two sides with full buffers cannot block each
other. One selector holds all connections, so any `wait` also learns which other replicas leave. Knows no placement and
no choice of replicas. `send_reference` and `release` are for `object_store`, which rides on the same connections.
Dimension letters: T tokens, H hidden, R rows, E experts of the group in that layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import FabricError, FrameError, ReplicaLostError
from cluster.fabric.frames import Buffer, Kind, Limits, encode
from cluster.fabric.links import Link, StreamCall
from cluster.fabric.open_link import open_link
from cluster.fabric.openings import Openings
from cluster.fabric.sockets import EDGE, READ, WRITE, Poller
from cluster.fabric.transport import Batch, Call
from cluster.membership import Replica

_LONGEST_DEADLINE_S = 1e6


class StreamTransport:
    """See `transport.Transport` for what every method promises.

    key: the cluster key. digest: the model digest, 32 bytes. node_id: this node, as in `Address.node`.
    connect_timeout_s: for connecting and handshake together; the one thing here that blocks besides `wait`, and only
        for a replica that was not prepared.
    unsent_bytes: a replica that has left more than these in our hands is lost to us: it takes no more rows.
    """

    name = "stream"

    def __init__(
        self,
        *,
        key: bytes,
        digest: bytes,
        node_id: str,
        connect_timeout_s: float = 2.0,
        limits: Limits | None = None,
        unsent_bytes: int = 512 << 20,
    ) -> None:
        self._key = key
        self._digest = digest
        self._node_id = node_id
        self._connect_timeout_s = connect_timeout_s
        self._limits = limits or Limits()
        self._unsent_bytes = unsent_bytes
        self._links: dict[str, Link] = {}
        self._openings = Openings()
        self._poller: Poller[Link | Callable[[], None]] = Poller()
        self._sequence = 0
        self._arrivals = 0
        self._closed_sent = self._closed_received = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to sockets and mailboxes so far."""
        return self._closed_sent + sum(_sent_bytes(link) for link in tuple(self._links.values()))

    @property
    def bytes_received(self) -> int:
        """Bytes taken from sockets and mailboxes so far."""
        return self._closed_received + sum(_received_bytes(link) for link in tuple(self._links.values()))

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        """Connect in a thread of its own: a replica that hangs accepts a connection, and then says nothing."""
        if replica.id in self._links:
            return True
        link = self._openings.take(replica, patience_s, self._open)
        if link is not None:
            self._keep(link)
        return link is not None

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> StreamCall:
        """Pack `hidden[index]` and send it to `replica`; see `Transport.send`.

        Raises:
            FabricError: besides what `Transport` says: the batch is larger than a frame may be.
        """
        hidden = batch.hidden
        shape, dtype = (len(batch.index), hidden.shape[1]), hidden.dtype
        link = self._ready(replica, *shape, dtype)
        call = self._call(replica, Kind.ROWS, shape, dtype, batch)
        payload, deadline_ms = batch.gathered(), _milliseconds(deadline_s)
        if link.mail(call, batch, payload, deadline_ms):
            link.calls[call.sequence] = call
            return call
        return self._post(link, call, batch.layer, batch.counts, payload, deadline_ms, batch.trace)

    def send_reference(
        self,
        replica: Replica,
        *,
        layer: int,
        counts: npt.NDArray[np.int64],
        rows: int,
        hidden: int,
        dtype: torch.dtype,
        payload: bytes,
        deadline_s: float,
        trace: bytes = b"",
    ) -> StreamCall:
        """Send what `ReferenceCodec.load` takes there instead of rows [rows, hidden]; `StreamCall.payload()` will be
        what `ReferenceCodec.store` gave. After reading that, call `release`. Errors as of `send`.
        """
        link = self._ready(replica, rows, hidden, dtype)
        call = self._call(replica, Kind.REFERENCE, (rows, hidden), dtype)
        return self._post(link, call, layer, counts, payload, _milliseconds(deadline_s), trace)

    def release(self, call: StreamCall) -> None:
        """Tell the replica that its reference has been read. Never raises: a lost connection ends its references."""
        link = self._links.get(call.replica_id)
        if link is not None and call.kind is Kind.REFERENCE and call.frame is not None:
            self._push(link, encode(Kind.RELEASE, call.sequence, digest8=self._digest[:8]))

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        """The calls among `calls` that are done; see `Transport.wait`."""
        give_up_at = time.monotonic() + timeout_s
        left_s, expired = timeout_s, False
        while True:
            done = [call for call in calls if call.done]
            if done or expired:
                return sorted(done, key=_arrival) if len(done) > 1 else done
            expired = left_s <= 0
            poll = self._poller.poll if expired or not self._mailed() else self._poller.linger
            for target, events in poll(max(0.0, left_s)):
                if isinstance(target, Link):
                    self._serve(target, events)
                else:
                    target()
            left_s = give_up_at - time.monotonic()

    def _mailed(self) -> bool:
        """Whether a batch that somebody waits for lies in a mailbox."""
        return any(link.mailed is not None and not link.mailed.forgotten for link in self._links.values())

    def forget(self, call: Call, *, watched: bool = False) -> None:  # noqa: ARG002  nothing depends on it here
        """Drop the result when it comes; a reference is released then."""
        if isinstance(call, StreamCall) and not call.forgotten:
            call.forgotten = True
            if call.done:
                self.release(call)
            elif (link := self._links.get(call.replica_id)) is not None:
                link.forget(call)

    def retain(self, replica_ids: Collection[str]) -> None:
        """Close the connections to all other replicas."""
        for replica_id in set(self._links).difference(replica_ids):
            self._lose(self._links[replica_id], "it has left the cluster, or is given up")
        self._openings.retain(replica_ids)

    def close(self) -> None:
        """Close every connection."""
        self.retain(())

    def _ready(self, replica: Replica, rows: int, hidden: int, dtype: torch.dtype) -> Link:
        """The link for a batch of this shape; errors as of `send`."""
        limits = self._limits
        if rows > limits.rows or rows * hidden * dtype.itemsize > limits.payload_bytes:
            raise FabricError(f"{rows} rows of {hidden} x {dtype} are more than one frame may hold.")
        link = self._link(replica)
        if link.writer.pending_bytes > self._unsent_bytes:
            self._lose(link, "it takes no more rows")
            raise ReplicaLostError(f"{replica.id} takes no more rows.")
        return link

    def _call(
        self, replica: Replica, kind: Kind, shape: tuple[int, int], dtype: torch.dtype, batch: Batch | None = None
    ) -> StreamCall:
        self._sequence += 1
        return StreamCall(self._sequence, replica.id, kind, *shape, dtype, batch)

    def _post(
        self,
        link: Link,
        call: StreamCall,
        layer: int,
        counts: npt.NDArray[np.int64],
        payload: Buffer,
        deadline_ms: int,
        trace: bytes,
    ) -> StreamCall:
        """Send a call by the socket."""
        buffers = encode(
            call.kind,
            call.sequence,
            digest8=link.digest8,
            layer=layer,
            rows=call.rows,
            hidden=call.hidden,
            dtype=call.dtype,
            deadline_ms=deadline_ms,
            counts=counts,
            body=payload,
            trace=trace,
        )
        link.calls[call.sequence] = call
        self._push(link, buffers)
        if call.error is not None:
            raise call.error
        return call

    def _link(self, replica: Replica) -> Link:
        link = self._links.get(replica.id)
        if link is None:
            if replica.id in self._openings:
                link = self._openings.take(replica, self._connect_timeout_s, self._open)
                if link is None:
                    raise ReplicaLostError(f"{replica.id} did not finish the handshake in time.")
            else:
                link = self._open(replica)
            self._keep(link)
        if link.leaving:
            raise ReplicaLostError(f"{replica.id} is draining.")
        return link

    def _open(self, replica: Replica) -> Link:
        """Connect; may run in any thread."""
        return open_link(
            replica,
            key=self._key,
            digest=self._digest,
            node_id=self._node_id,
            timeout_s=self._connect_timeout_s,
            limits=self._limits,
        )

    def _keep(self, link: Link) -> None:
        self._watch(link)
        self._links[link.replica_id] = link

    def _watch(self, link: Link) -> None:
        """Listen to a new link, or close it."""
        with ExitStack() as undo:
            undo.callback(link.close)
            try:
                self._poller.register(link.sock, READ, link)
                undo.callback(self._poller.unregister, link.sock)
                if link.mailbox is not None:
                    self._poller.register(link.mailbox.bell, EDGE, partial(self._collect, link))
            except OSError as error:
                raise ReplicaLostError(f"{link.replica_id} cannot be listened to: {error}.") from None
            undo.pop_all()
        link.events = READ

    def _push(self, link: Link, buffers: list[Buffer]) -> None:
        try:
            link.send(buffers)
        except OSError as error:
            self._break(link, str(error))
            return
        if link.writer.pending_bytes:
            self._update_events(link)

    def _serve(self, link: Link, events: int) -> None:
        """Send and read what is possible now."""
        answered: list[StreamCall] = []
        try:
            if events & WRITE:
                link.writer.flush(link.sock)
            if events & READ:
                link.receive(answered)
        except BlockingIOError:
            pass
        except (FrameError, OSError) as error:
            self._break(link, str(error))
        for call in answered:
            self._arrived(call)
        if link.events != READ:
            self._update_events(link)

    def _collect(self, link: Link) -> None:
        """Take the result that the bell of a mailbox announces."""
        if self._links.get(link.replica_id) is not link:
            return
        try:
            call = link.collect()
        except FrameError as error:
            self._lose(link, str(error))
            return
        if call is not None:
            self._arrived(call)

    def _arrived(self, call: StreamCall) -> None:
        self._done(call)
        if call.forgotten:
            self.release(call)

    def _done(self, call: StreamCall) -> None:
        self._arrivals += 1
        call.arrival = self._arrivals
        call.done = True

    def _update_events(self, link: Link) -> None:
        events = READ | WRITE if link.writer.pending_bytes else READ
        if events != link.events and self._links.get(link.replica_id) is link:
            self._poller.modify(link.sock, events)
            link.events = events

    def _break(self, link: Link, reason: str) -> None:
        """The other side ended the connection, or spoilt it: what it had put into the mailbox before counts."""
        call = link.collect_last()
        if call is not None:
            self._arrived(call)
        self._lose(link, reason)

    def _lose(self, link: Link, reason: str) -> None:
        """The connection is over: so are its calls."""
        if self._links.get(link.replica_id) is not link:
            return
        self._closed_sent += _sent_bytes(link)
        self._closed_received += _received_bytes(link)
        del self._links[link.replica_id]
        self._poller.unregister(link.sock)
        if link.mailbox is not None:
            self._poller.unregister(link.mailbox.bell)
        link.close()
        for call in link.calls.values():
            self._done(call)
            call.error = ReplicaLostError(f"{link.replica_id} is lost: {reason}.")
        link.calls.clear()


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(max(seconds, 0.0), _LONGEST_DEADLINE_S) * 1000)


def _sent_bytes(link: Link) -> int:
    return link.writer.sent_bytes + link.mailed_bytes


def _received_bytes(link: Link) -> int:
    return link.reader.received_bytes + link.collected_bytes


def _arrival(call: Call) -> int:
    return call.arrival if isinstance(call, StreamCall) else 0

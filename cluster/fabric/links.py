"""The router's end of one connection: open it, prove the key, and keep track of the calls on it.

A link ends once: with an error that all its open calls get. Knows no selector and no choice of replicas.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.errors import FabricError, FrameError, HandshakeError, ReplicaLostError
from cluster.fabric.frame_io import FrameReader, FrameWriter
from cluster.fabric.frames import HANDSHAKE_LIMITS, Buffer, Frame, Kind, Limits, Status, encode
from cluster.fabric.handshake import NONCE_BYTES, Identity, RouterHandshake
from cluster.fabric.sockets import connect
from cluster.membership import Replica


class StreamCall:
    """One batch on its way; see `transport.Call`.

    kind: ROWS or REFERENCE. rows, hidden, dtype: of the rows sent and of the result. arrival: rises by order of being
    done, 0 before. forgotten: nobody will ask for the result.
    """

    __slots__ = (
        "arrival",
        "compute_s",
        "dtype",
        "error",
        "forgotten",
        "frame",
        "hidden",
        "kind",
        "queue_rows",
        "replica_id",
        "rows",
        "sequence",
    )

    def __init__(self, sequence: int, replica_id: str, kind: Kind, rows: int, hidden: int, dtype: torch.dtype) -> None:
        self.sequence = sequence
        self.replica_id = replica_id
        self.kind = kind
        self.rows = rows
        self.hidden = hidden
        self.dtype = dtype
        self.arrival = 0
        self.queue_rows = 0
        self.compute_s = 0.0
        self.forgotten = False
        self.error: FabricError | None = None
        self.frame: Frame | None = None

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.arrival > 0

    def result(self) -> Tensor:
        """[R, H], a view of the buffer it was received in.

        Raises:
            FabricError: `error`, or the call is not done, or it was answered with a reference.
        """
        tensor = None if self.frame is None else self.frame.tensor
        if tensor is None:
            raise self.error or FabricError("the call has no result yet, or a reference instead of rows.")
        return tensor

    def payload(self) -> bytes:
        """What the replica answered a reference with.

        Raises:
            FabricError: `error`, or the call is not done.
        """
        if self.frame is None:
            raise self.error or FabricError("the call has no result yet.")
        return bytes(self.frame.data)

    def fits(self, frame: Frame) -> bool:
        """Whether `frame` is the result of this call, by kind and shape."""
        return (
            frame.rows == self.rows
            and frame.hidden == self.hidden
            and frame.dtype is self.dtype
            and frame.kind is (Kind.RESULT if self.kind is Kind.ROWS else Kind.REFERENCE)
        )


class Link:
    """An authenticated connection to one replica. `leaving`: it said GOAWAY. `events`: what its selector waits for."""

    __slots__ = ("calls", "digest8", "events", "leaving", "reader", "replica_id", "sock", "writer")

    def __init__(self, sock: socket.socket, replica_id: str, reader: FrameReader, writer: FrameWriter) -> None:
        self.sock = sock
        self.replica_id = replica_id
        self.reader = reader
        self.writer = writer
        self.digest8 = reader.digest8 or b""
        self.leaving = False
        self.events = 0
        self.calls: dict[int, StreamCall] = {}

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send what the socket takes, queue the rest; OSError where the connection is broken."""
        self.writer.send(self.sock, buffers)

    def receive(self, answered: list[StreamCall]) -> None:
        """Read once; adds the calls this answered, forgotten ones included, with their frames or errors set.

        Raises:
            FrameError, OSError: the connection is of no further use; what is in `answered` counts nevertheless.
        """
        for frame in self.reader.receive(self.sock):
            call = self.calls.get(frame.sequence)
            if call is not None and call.fits(frame):
                call.frame = frame
            elif call is not None and frame.kind is Kind.ERROR:
                error = FabricError if frame.status == Status.FAILED else ReplicaLostError
                call.error = error(f"{self.replica_id}: {_text(frame)}")
            else:
                self._heed(frame)
                continue
            del self.calls[frame.sequence]
            call.queue_rows = frame.queue_rows
            call.compute_s = frame.compute_us / 1e6
            answered.append(call)

    def _heed(self, frame: Frame) -> None:
        """A frame that answers no call."""
        if frame.kind is Kind.GOAWAY:
            self.leaving = True
        elif frame.kind is Kind.PING:
            self.send(encode(Kind.PONG, frame.sequence, digest8=self.digest8))
        elif frame.kind is Kind.ERROR and frame.status == Status.CLOSING:
            raise ConnectionAbortedError(_text(frame))
        else:
            raise FrameError(f"a {frame.kind.name} frame answers no call of this connection.")


def open_link(replica: Replica, *, key: bytes, digest: bytes, node_id: str, timeout_s: float, limits: Limits) -> Link:
    """Connect and prove the key; blocks for at most `timeout_s`. The link's socket is non-blocking.

    Raises:
        ReplicaLostError: nobody answers in time.
        HandshakeError: the other side refuses, or has another cluster key, model digest or wire version.
    """
    give_up_at = time.monotonic() + timeout_s
    wanted = Identity(digest, replica.group, replica.id)
    try:
        sock = connect(replica.address, node_id, timeout_s)
    except OSError as error:
        raise ReplicaLostError(f"{replica.id} cannot be reached: {error}.") from None
    try:
        reader, writer = FrameReader(HANDSHAKE_LIMITS), FrameWriter()
        handshake = RouterHandshake(key, wanted, secrets.token_bytes(NONCE_BYTES))
        leaving = _shake_hands(sock, reader, writer, handshake, give_up_at)
    except FrameError as error:
        sock.close()
        raise HandshakeError(f"{replica.id} does not speak this router's language: {error}") from None
    except OSError as error:
        sock.close()
        raise ReplicaLostError(f"{replica.id} did not finish the handshake: {error}.") from None
    except HandshakeError:
        sock.close()
        raise
    sock.setblocking(False)
    reader.limits, reader.digest8 = limits, digest[:8]
    link = Link(sock, replica.id, reader, writer)
    link.leaving = leaving
    return link


def _shake_hands(
    sock: socket.socket, reader: FrameReader, writer: FrameWriter, handshake: RouterHandshake, give_up_at: float
) -> bool:
    """Run the handshake on a blocking socket; returns whether a GOAWAY came right behind it."""
    writer.send(sock, handshake.hello())
    while True:
        sock.settimeout(max(0.001, give_up_at - time.monotonic()))
        for frame in reader.receive(sock):
            if frame.kind is Kind.GOAWAY and handshake.done:
                return True
            writer.send(sock, handshake.answer(frame))
        if handshake.done:
            return False
        if time.monotonic() >= give_up_at:
            raise TimeoutError("it took too long")


def _text(frame: Frame) -> str:
    return bytes(frame.data).decode("utf-8", "replace")

"""Opening the router's end of one connection: connect, prove the key, adopt the mailbox of a replica on this node.

Blocks, unlike everything that comes after it (`links`). Knows no calls.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from array import array

from cluster.errors import FrameError, HandshakeError, ReplicaLostError
from cluster.fabric.frame_io import FrameReader, FrameWriter
from cluster.fabric.frames import HANDSHAKE_LIMITS, Kind, Limits
from cluster.fabric.handshake import NONCE_BYTES, Identity, RouterHandshake
from cluster.fabric.links import Link
from cluster.fabric.mailbox import FILES, Mailbox
from cluster.fabric.sockets import connect
from cluster.membership import Replica


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
    source = _Source(sock)
    try:
        reader, writer = FrameReader(HANDSHAKE_LIMITS), FrameWriter()
        handshake = RouterHandshake(key, wanted, secrets.token_bytes(NONCE_BYTES))
        leaving = _shake_hands(source, reader, writer, handshake, give_up_at)
    except FrameError as error:
        source.close()
        raise HandshakeError(f"{replica.id} does not speak this router's language: {error}") from None
    except OSError as error:
        source.close()
        raise ReplicaLostError(f"{replica.id} did not finish the handshake: {error}.") from None
    except HandshakeError:
        source.close()
        raise
    sock.setblocking(False)
    reader.expect(limits, digest[:8])
    mailbox = Mailbox.adopt(source.files) if source.files else None
    link = Link(sock, replica.id, reader, writer, digest[:8], limits, mailbox)
    link.leaving = leaving
    return link


class _Source:
    """A socket during the handshake, and the files that came along with its frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.files: list[int] = []

    def recv_into(self, buffer: memoryview) -> int:
        room = socket.CMSG_SPACE(FILES * array("i").itemsize)
        got, ancillary, _, _ = self.sock.recvmsg_into([buffer], room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.files += array("i", data[: len(data) - len(data) % 4])
        return got

    def close(self) -> None:
        self.sock.close()
        for file in self.files:
            os.close(file)


def _shake_hands(
    source: _Source, reader: FrameReader, writer: FrameWriter, handshake: RouterHandshake, give_up_at: float
) -> bool:
    """Run the handshake on a blocking socket; returns whether a GOAWAY came right behind it."""
    sock = source.sock
    writer.send(sock, handshake.hello())
    while True:
        sock.settimeout(max(0.001, give_up_at - time.monotonic()))
        for frame in reader.receive(source):
            if frame.kind is Kind.GOAWAY and handshake.done:
                return True
            writer.send(sock, handshake.answer(frame))
        if handshake.done:
            return False
        if time.monotonic() >= give_up_at:
            raise TimeoutError("it took too long")

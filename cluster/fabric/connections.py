"""The connections of one expert server: accept, authenticate, read, write, and bound what each may cost.

Used by the server's thread alone. Knows no rows and no references: authenticated frames go to `on_frame`, and
`on_gone` is told once of every authenticated connection that ends.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from cluster.errors import FrameError, HandshakeError
from cluster.fabric.frame_io import FrameReader, FrameWriter
from cluster.fabric.frames import HANDSHAKE_LIMITS, Buffer, Frame, HeaderCheck, Kind, Limits, Status, encode
from cluster.fabric.handshake import NONCE_BYTES, Identity, ReplicaHandshake, refusal
from cluster.fabric.mailbox import SUPPORTED, Mailbox
from cluster.fabric.sockets import EDGE, READ, WRITE, Poller, tune
from cluster.fabric.strangers import Strangers

log = logging.getLogger(__name__)
_REASON_BYTES = 512
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC})


@dataclass(frozen=True)
class ServerLimits:
    """Bounds on what connections may cost.

    handshake_s: an unauthenticated connection lives no longer. strangers: unauthenticated connections at once; the
    oldest makes room. stall_s: a peer that takes no bytes, or stops in the middle of a frame, for longer is closed.
    out_bytes: unsent replies of one connection. waiting_bytes: rows of one connection that wait; beyond that nothing
    more is read from it. references: unreleased results of one connection. frame: bounds of one frame.
    """

    handshake_s: float = 5.0
    strangers: int = 32
    stall_s: float = 30.0
    out_bytes: int = 512 << 20
    waiting_bytes: int = 512 << 20
    references: int = 4096
    frame: Limits = field(default_factory=Limits)


class Connection:
    """One router, or a stranger until `handshake` is None. `moved_s`: when bytes last went either way.

    host: where it comes from, "" by Unix socket.
    mailbox: for a router on this node. mailed: a request lies in it that has not been answered.
    """

    __slots__ = (
        "events",
        "handshake",
        "host",
        "mailbox",
        "mailed",
        "moved_s",
        "open",
        "reader",
        "references",
        "since_s",
        "sock",
        "waiting_bytes",
        "writer",
    )

    def __init__(self, sock: socket.socket, handshake: ReplicaHandshake, now: float, host: str = "") -> None:
        self.sock = sock
        self.host = host
        self.handshake: ReplicaHandshake | None = handshake
        self.reader = FrameReader(HANDSHAKE_LIMITS)
        self.writer = FrameWriter()
        self.since_s = self.moved_s = now
        self.events = READ
        self.open = True
        self.waiting_bytes = 0
        self.references: dict[int, object] = {}
        self.mailbox: Mailbox | None = None
        self.mailed = False


class Connections:
    """All connections of one server and the selector they wait in."""

    def __init__(
        self,
        key: bytes,
        identity: Identity,
        limits: ServerLimits,
        on_frame: Callable[[Connection, Frame], None],
        on_gone: Callable[[Connection], None],
    ) -> None:
        self.routers: set[Connection] = set()
        self.draining = False
        self.digest8 = identity.digest[:8]
        self._key = key
        self._identity = identity
        self._limits = limits
        self._on_frame = on_frame
        self._on_gone = on_gone
        self._mail_check = HeaderCheck(replace(limits.frame, codes=frozenset({Kind.ROWS.value})), self.digest8)
        self._strangers: dict[Connection, None] = {}  # in order of age
        self._trouble = Strangers()
        self._listeners: list[socket.socket] = []
        self._resting: list[socket.socket] = []
        self._poller: Poller[Connection | Callable[[], object]] = Poller()
        self._tick_s = min(1.0, limits.handshake_s / 4, limits.stall_s / 4)
        self._next_tick_s = 0.0

    def listen(self, listener: socket.socket) -> None:
        """Accept connections from a non-blocking listener."""
        self._listeners.append(listener)
        self._poller.register(listener, READ, partial(self._accept, listener))

    def watch(self, waker: socket.socket) -> None:
        """Let another thread end `poll` early by writing to the other end of `waker`."""
        self._poller.register(waker, READ, partial(waker.recv, 4096))

    def poll(self, timeout_s: float | None) -> float:
        """Read and write what is possible now, waiting at most `timeout_s` for something to be; returns the time."""
        timeout_s = self._tick_s if timeout_s is None else min(timeout_s, self._tick_s)
        for target, events in self._poller.poll(timeout_s):
            if isinstance(target, Connection):
                self._serve(target, events)
            else:
                target()
        now = time.monotonic()
        if now >= self._next_tick_s:
            self._next_tick_s = now + self._tick_s
            self._wake_listeners()
            self._close_overdue(now)
        return now

    def send(self, connection: Connection, buffers: list[Buffer]) -> None:
        """Send one frame, or queue what the socket does not take; a connection that cannot be sent to is closed."""
        if not connection.open:
            return
        if not connection.writer.pending_bytes:
            connection.moved_s = time.monotonic()
        try:
            connection.writer.send(connection.sock, buffers)
        except OSError:
            self.close(connection)
            return
        if connection.writer.pending_bytes > self._limits.out_bytes:
            log.warning("closing the connection of a router that does not read its replies")
            self.close(connection)
        elif connection.writer.pending_bytes or connection.events != READ:
            self.update_events(connection)

    def answer(self, connection: Connection, request: Frame, output: Tensor, queue_rows: int, compute_us: int) -> None:
        """Put the result of a request that came by mailbox there, too."""
        mailbox = connection.mailbox
        if mailbox is None or not connection.open:
            return
        connection.mailed = False
        mailbox.result.write_result(request, output, self.digest8, queue_rows, compute_us)
        mailbox.ring()
        if connection.events != READ:
            self.update_events(connection)

    def fail(self, connection: Connection, reason: str) -> None:
        """Close a connection with a stated reason, as far as its socket takes it now."""
        if not connection.open:
            return
        if connection.handshake is None:
            log.warning("closing the connection of a router: %s", reason)
            body = reason.encode()[:_REASON_BYTES]
            buffers = encode(Kind.ERROR, digest8=self.digest8, status=Status.CLOSING, body=body)
        else:
            log.info("closing an unauthenticated connection: %s", reason)
            buffers = refusal(reason)
        with suppress(OSError):
            connection.writer.send(connection.sock, buffers)
        self.close(connection)

    def close(self, connection: Connection) -> None:
        """Close one connection. Idempotent."""
        if not connection.open:
            return
        connection.open = False
        if connection.events:
            self._poller.unregister(connection.sock)
        connection.sock.close()
        if connection.mailbox is not None:
            self._poller.unregister(connection.mailbox.bell)
            connection.mailbox.close()
            connection.mailbox = None
        if connection in self._strangers:
            del self._strangers[connection]
            if connection.handshake is not None and connection.handshake.proved:
                self._trouble.proved(connection.host)  # with another model: no stranger
            else:
                self._trouble.troubled(connection.host, time.monotonic())
        if connection in self.routers:
            self.routers.discard(connection)
            self._on_gone(connection)

    def update_events(self, connection: Connection) -> None:
        """Wait for what the connection can make use of: nothing is read from one with too many waiting rows."""
        reads = READ if connection.waiting_bytes <= self._limits.waiting_bytes else 0
        events = reads | (WRITE if connection.writer.pending_bytes else 0)
        if not connection.open or events == connection.events:
            return
        if not events:
            self._poller.unregister(connection.sock)
        elif not connection.events:
            self._poller.register(connection.sock, events, connection)
        else:
            self._poller.modify(connection.sock, events)
        connection.events = events

    def drain(self) -> None:
        """Stop accepting and tell every router to send elsewhere. Connections stay open."""
        self.draining = True
        self._close_listeners()
        for connection in list(self.routers):
            self.send(connection, encode(Kind.GOAWAY, digest8=self.digest8))

    @property
    def flushed(self) -> bool:
        """Whether nothing is left to send and no result is held for a router."""
        return not any(c.writer.pending_bytes or c.references for c in self.routers)

    def close_all(self) -> None:
        """Close listeners and connections."""
        self._close_listeners()
        for connection in [*self.routers, *self._strangers]:
            self.close(connection)
        self._poller.close()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if listener not in self._resting:
                self._poller.unregister(listener)
            listener.close()
        self._listeners.clear()
        self._resting.clear()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._rest(listener, error)
            return
        now = time.monotonic()
        host = address[0] if isinstance(address, tuple) else ""
        if not self._trouble.admits(host, now):
            sock.close()
            return
        with ExitStack() as undo:
            undo.callback(sock.close)
            try:
                sock.setblocking(False)
                tune(sock)
                handshake = ReplicaHandshake(self._key, self._identity, secrets.token_bytes(NONCE_BYTES))
                connection = Connection(sock, handshake, now, host)
                self._poller.register(sock, READ, connection)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._rest(listener, error)
                return
            undo.pop_all()
        if len(self._strangers) >= self._limits.strangers:
            self.fail(next(iter(self._strangers)), "too many connections that have not proved the cluster key.")
        self._strangers[connection] = None

    def _rest(self, listener: socket.socket, error: OSError) -> None:
        """Leave `listener` alone until the next tick: it stays ready, and asking it again and again would be all that
        this thread does. Who connects meanwhile waits in its backlog.
        """
        log.warning("no new connections for %g s: %s", self._tick_s, error.strerror)
        self._poller.unregister(listener)
        self._resting.append(listener)

    def _wake_listeners(self) -> None:
        resting, self._resting = self._resting, []
        for listener in resting:
            try:
                self._poller.register(listener, READ, partial(self._accept, listener))
            except OSError:
                self._resting.append(listener)

    def _serve(self, connection: Connection, events: int) -> None:
        if not connection.open:
            return
        try:
            if events & WRITE:
                connection.writer.flush(connection.sock)
                connection.moved_s = time.monotonic()
                self.update_events(connection)
            if events & READ:
                for frame in connection.reader.receive(connection.sock):
                    if connection.handshake is None:
                        self._on_frame(connection, frame)
                    else:
                        self._greet(connection, connection.handshake, frame)
                if connection.reader.partial:
                    connection.moved_s = time.monotonic()
        except BlockingIOError:
            return
        except (FrameError, HandshakeError) as error:
            self.fail(connection, str(error))
        except OSError:
            self.close(connection)
        except Exception:
            log.exception("closing a connection after an error of this server")
            self.fail(connection, "internal error of the replica.")

    def _greet(self, connection: Connection, handshake: ReplicaHandshake, frame: Frame) -> None:
        reply = handshake.answer(frame)
        if handshake.done:
            self._trouble.proved(connection.host)
            connection.handshake = None
            connection.reader.expect(self._limits.frame, self.digest8)
            del self._strangers[connection]
            self.routers.add(connection)
            self._welcome(connection, reply)
        else:
            self.send(connection, reply)

    def _welcome(self, connection: Connection, reply: list[Buffer]) -> None:
        """The last frame of a handshake, along with the files of a mailbox for a router on this node."""
        if self.draining:  # said in the same message: a router reads no further than one that brings files
            reply = [*reply, *encode(Kind.GOAWAY, digest8=self.digest8)]
        if connection.sock.family == socket.AF_UNIX and SUPPORTED and self._send_mailbox(connection, reply):
            return
        self.send(connection, reply)

    def _send_mailbox(self, connection: Connection, reply: list[Buffer]) -> bool:
        """Send `reply` and a mailbox; False, and nothing sent or left open, where the system does not allow it."""
        with ExitStack() as undo:
            try:
                mailbox = Mailbox.create()
                undo.callback(mailbox.close)
                self._poller.register(mailbox.bell, EDGE, partial(self._open_mail, connection, mailbox))
                undo.callback(self._poller.unregister, mailbox.bell)
                files = array("i", mailbox.files).tobytes()
                connection.sock.sendmsg(reply, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            except OSError as error:
                log.warning("no mailbox for a router on this node: %s", str(error))  # the error holds files
                return False
            undo.pop_all()
        connection.mailbox = mailbox
        return True

    def _open_mail(self, connection: Connection, mailbox: Mailbox) -> None:
        """Take the request that the bell announces."""
        if not connection.open:
            return
        try:
            if connection.mailed:
                raise FrameError("a second request in a mailbox before the first was answered.")
            frame = mailbox.request.read(self._mail_check).frame
            connection.mailed = True
            self._on_frame(connection, frame)
        except FrameError as error:
            self.fail(connection, str(error))
        except Exception:
            log.exception("closing a connection after an error of this server")
            self.fail(connection, "internal error of the replica.")

    def _close_overdue(self, now: float) -> None:
        """Close strangers that took too long and routers that stopped half-way."""
        for connection in list(self._strangers):
            if now - connection.since_s > self._limits.handshake_s:
                self.fail(connection, f"the handshake took longer than {self._limits.handshake_s:g} s.")
        for connection in list(self.routers):
            half_way = connection.writer.pending_bytes or (connection.reader.partial and connection.events & READ)
            if half_way and now - connection.moved_s > self._limits.stall_s:
                self.fail(connection, f"no progress for {self._limits.stall_s:g} s.")

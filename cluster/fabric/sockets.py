"""The fabric's sockets, Unix on one node and TCP between nodes: opening them, waiting for them. Knows no frame."""

from __future__ import annotations

import math
import os
import select
import socket
import stat
from contextlib import suppress
from typing import Generic, TypeVar

from cluster.errors import ConfigError
from cluster.membership import Address

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
EDGE = select.EPOLLIN | select.EPOLLET
"""Ready once for every time that something comes, read or not: for bells."""
UNIX_PATH_BYTES = 100
_BOTH = READ | WRITE
_EVENTS_PER_POLL = 64
_LOOKS = 30
"""About 40 us on an idle core."""
Target = TypeVar("Target")
_BACKLOG = 128
_DEAD_PEER_MS = 10_000
_UNIX_SEND_BYTES = 4 << 20


class Poller(Generic[Target]):
    """Waits for sockets, like `selectors.EpollSelector` at half its price; `target` is what `poll` returns for one.

    A descriptor may stand for a socket. Linux only, as the rest of the cluster.
    A socket that is broken or at its end is ready for whatever was asked.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._targets: dict[int, Target] = {}

    def register(self, sock: socket.socket | int, events: int, target: Target) -> None:
        """Wait for `events`: READ, WRITE or both, or EDGE."""
        self._epoll.register(sock, events)
        self._targets[sock if isinstance(sock, int) else sock.fileno()] = target

    def modify(self, sock: socket.socket, events: int) -> None:
        """Wait for other events."""
        self._epoll.modify(sock, events)

    def unregister(self, sock: socket.socket | int) -> None:
        """Before the socket is closed."""
        self._epoll.unregister(sock)
        del self._targets[sock if isinstance(sock, int) else sock.fileno()]

    def poll(self, timeout_s: float) -> list[tuple[Target, int]]:
        """What is ready, after at most `timeout_s`: (target, READ, WRITE or both)."""
        # epoll counts in whole milliseconds: rounded down, the last one would be spent spinning.
        ready = self._epoll.poll(timeout_s and math.ceil(timeout_s * 1e3) * 1e-3, _EVENTS_PER_POLL)
        if not ready:
            return []
        targets = self._targets
        return [(targets[fd], events if events <= _BOTH else _BOTH) for fd, events in ready]

    def linger(self, timeout_s: float) -> list[tuple[Target, int]]:
        """`poll`, after a few looks without sleep: for small batches, which are back within those.

        Being put to sleep and woken costs both sides more than the looks; whoever has work for this core gets it.
        """
        for _ in range(_LOOKS):
            if ready := self.poll(0.0):
                return ready
            os.sched_yield()
        return self.poll(timeout_s)

    def close(self) -> None:
        """Idempotent."""
        self._epoll.close()


def listen_unix(path: str) -> socket.socket:
    """A listening, non-blocking Unix socket at `path`, in a directory only its owner may enter.

    Raises:
        ConfigError: the path is longer than 100 bytes, its directory does not have mode 0700, or it cannot be bound.
    """
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        raise ConfigError(f"the Unix socket path {path} is longer than {UNIX_PATH_BYTES} bytes.")
    folder = os.path.dirname(path) or "."
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        if mode != 0o700:
            raise ConfigError(f"the directory {folder} of the Unix socket has mode {mode:04o}; it must be 0700.")
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"the Unix socket {path} cannot be opened: {error.strerror}.") from None
    except ConfigError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def listen_tcp(host: str) -> socket.socket:
    """A listening, non-blocking TCP socket on a free port of `host`.

    Raises:
        ConfigError: `host` is no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        # The latter is what a name that no resolver could look up gives.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"experts.host: {host!r} cannot be listened on: {reason}.") from None
    listener.setblocking(False)
    return listener


def connect(address: Address, node_id: str, timeout_s: float) -> socket.socket:
    """Connect to a replica: by its Unix socket where it is on this node and that exists, else by TCP.

    The socket is returned in blocking mode with `timeout_s`. Raises OSError where nobody answers.
    """
    if address.node == node_id and address.unix_path and os.path.exists(address.unix_path):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address.unix_path)
            tune(sock)
        except OSError:
            sock.close()
            raise
        return sock
    if not address.port:
        raise ConnectionRefusedError(f"{address.unix_path or address.host} is not reachable from this node")
    sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
    tune(sock)
    return sock


def tune(sock: socket.socket) -> None:
    """Unix: let a whole batch be sent in one call. TCP: send small frames at once, and notice a dead node within about
    ten seconds.
    """
    if sock.family == socket.AF_UNIX:
        # The system may grant less. TCP sizes its buffers itself.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", _DEAD_PEER_MS),
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
    ):
        # Linux names; elsewhere the system's own keep-alive times apply.
        if option := getattr(socket, name, None):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def unlink(path: str) -> None:
    """Remove the socket file if it is still there."""
    with suppress(FileNotFoundError):
        os.unlink(path)

"""The floor under every fabric: the same bytes through bare sockets, there and back, and nothing else.

One side, the echo, is a thread in each expert process; the other is `Floor` in the measuring process. A sample begins
with a size and a number of calls for each echo, which then knows without any framing what to read. Between samples an
echo sleeps in `recv`, so it does not disturb what else its process does. Knows no rows, no frames and no experts.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from cluster.fabric.sockets import tune

WAIT_S = 30
_ORDER = struct.Struct("<QQ")
_KERNEL_TIME = struct.Struct("@ll")


class Echo:
    """Sends back what one client sends, in a thread of its own, until the client leaves."""

    def __init__(self, path: str) -> None:
        """path: of the Unix socket to listen on."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, name="floor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._listener:
            client, _ = self._listener.accept()
        memory = bytearray()
        with client:
            tune(client)
            while order := client.recv(_ORDER.size, socket.MSG_WAITALL):
                size, calls = _ORDER.unpack(order)
                if len(memory) < size:
                    memory = bytearray(size)
                payload = memoryview(memory)[:size]
                for _ in range(calls):
                    if client.recv_into(payload, size, socket.MSG_WAITALL) < size:
                        return
                    client.sendall(payload)


class Floor:
    """Connections to one echo per group. The sockets block, and all four are written before the first is read."""

    def __init__(self, paths: Sequence[str]) -> None:
        """paths: where the echoes listen.

        Raises:
            OSError: one does not.
        """
        self._memory = bytearray()
        self._ways: list[tuple[socket.socket, memoryview, memoryview, int]] = []
        self._sockets: list[socket.socket] = []
        with ExitStack() as stack:
            for path in paths:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                # A deadline kept by the kernel: Python's own would cost a `poll` before every call.
                for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, option, _KERNEL_TIME.pack(WAIT_S, 0))
                sock.connect(path)
                tune(sock)
                self._sockets.append(sock)
            self._stack = stack.pop_all()

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, sizes: Sequence[int], calls: int) -> None:
        """Prepare for exactly `calls` times `ping_pong` with sizes[i] bytes for echo i; none for a size of 0."""
        if len(self._memory) < 2 * sum(sizes):
            self._memory = bytearray(2 * sum(sizes))
        self._ways = []
        start = 0
        for sock, size in zip(self._sockets, sizes, strict=True):
            if size:
                there, back = (memoryview(self._memory)[at : at + size] for at in (start, start + size))
                self._ways.append((sock, there, back, size))
                sock.sendall(_ORDER.pack(size, calls))
            start += 2 * size

    def ping_pong(self) -> None:
        """All bytes there, then all bytes back.

        Raises:
            OSError: an echo is gone, or silent for `WAIT_S`.
        """
        for sock, there, _back, _size in self._ways:
            sock.sendall(there)
        for sock, _there, back, size in self._ways:
            if sock.recv_into(back, size, socket.MSG_WAITALL) < size:
                raise ConnectionResetError("an echo is gone")

"""Reading frames from a non-blocking socket and writing them to one, without copying payloads; not what they mean.

A reader is fed untrusted bytes: every header passes `frames.HeaderCheck` before a payload buffer is allocated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from cluster.fabric.frames import (
    HEADER_BYTES,
    STAGING_BYTES,
    Buffer,
    Frame,
    HeaderCheck,
    Limits,
    allocate,
    check_trace,
    read_counts,
)

_BUFFERS_PER_CALL = 64


class Source(Protocol):
    """What a reader reads from: a socket, or a fake in tests."""

    def recv_into(self, buffer: memoryview) -> int:
        """Fill the front of `buffer`; 0 at the end of the stream."""


class Sink(Protocol):
    """What a writer writes to."""

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        """Send some of the bytes and say how many; BlockingIOError for none."""


class FrameReader:
    """Turns the bytes of one connection into frames.

    One `receive` is one system call. What arrives with a header is copied out of the staging buffer (at most 64 KiB,
    so that a small frame costs one call); the rest of a larger payload is received in place.

    place: may name the bytes where the payload of a frame belongs; by default, and where it gives None, it is put into
        memory of its own.
    """

    def __init__(
        self,
        limits: Limits,
        digest8: bytes | None = None,
        place: Callable[[Frame], memoryview | None] | None = None,
    ) -> None:
        self.received_bytes = 0
        self.place = place
        self._check = HeaderCheck(limits, digest8)
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._end = 0
        self._frame: Frame | None = None
        self._rest: memoryview | None = None

    def expect(self, limits: Limits, digest8: bytes | None) -> None:
        """What headers must respect from the next frame on (after the handshake).

        digest8: first 8 bytes of the model digest every frame must carry; None accepts any.
        """
        self._check = HeaderCheck(limits, digest8)

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._frame is not None or self._end > 0

    def receive(self, source: Source) -> list[Frame]:
        """Read once and return the frames that are now complete.

        Raises:
            FrameError: the bytes are no valid frame; the connection is of no further use.
            ConnectionResetError: the stream has ended. Whatever `source.recv_into` raises passes through.
        """
        if self._rest is not None:
            return self._receive_rest(source)
        end = self._end
        got = source.recv_into(self._staging[end:] if end else self._staging)
        if not got:
            raise ConnectionResetError("the other side closed the connection")
        self.received_bytes += got
        self._end = end + got
        return self._parse()

    def divert(self, sequence: int) -> None:
        """Receive what is still missing of a placed frame of this sequence elsewhere: nobody wants it any more."""
        frame = self._frame
        if frame is not None and self._rest is not None and frame.placed and frame.sequence == sequence:
            self._rest = memoryview(bytearray(len(self._rest)))

    def _receive_rest(self, source: Source) -> list[Frame]:
        if self._frame is None or self._rest is None:
            return []
        got = source.recv_into(self._rest)
        if got == 0:
            raise ConnectionResetError("the other side closed the connection")
        self.received_bytes += got
        self._rest = self._rest[got:]
        if len(self._rest):
            return []
        frame, self._frame, self._rest = self._frame, None, None
        return [frame]

    def _parse(self) -> list[Frame]:
        """Take every frame that is whole, and begin the body of one that is not."""
        frames: list[Frame] = []
        start, end, staging = 0, self._end, self._staging
        while end - start >= HEADER_BYTES:
            frame = self._check.parse(staging, start)
            head = start + HEADER_BYTES + frame.trace_bytes
            body = head + 8 * frame.n_counts
            if body > end:
                break
            if frame.trace_bytes:
                frame.trace = check_trace(bytes(staging[start + HEADER_BYTES : head]))
            if frame.n_counts:
                frame.counts = read_counts(staging[head:body], frame.rows)
            start = stop = body + frame.payload_bytes
            if stop > end:
                target, here = self._target(frame), end - body
                target[:here] = staging[body:end]
                self._frame, self._rest = frame, target[here:]
                start = end
                break
            if frame.payload_bytes:
                self._target(frame)[:] = staging[body:stop]
            frames.append(frame)
        if start == end:
            self._end = 0
        elif start:
            staging[: end - start] = bytes(staging[start:end])
            self._end = end - start
        return frames

    def _target(self, frame: Frame) -> memoryview:
        target = None if self.place is None else self.place(frame)
        if target is None:
            return allocate(frame)
        frame.placed = True
        return target


class FrameWriter:
    """The frames one connection still has to send. Never blocks; holds references to bodies, not copies."""

    def __init__(self) -> None:
        self._queue: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.sent_bytes = 0

    def send(self, sink: Sink, buffers: Sequence[Buffer]) -> None:
        """Queue one frame and send what the socket takes now; OSError where the connection is broken."""
        if self._queue:
            self._append(buffers)
            self.flush(sink)
            return
        sent = _sendmsg(sink, buffers)
        self.sent_bytes += sent
        if sent < sum(map(len, buffers)):
            self._append(buffers)
            self._drop(sent)

    def flush(self, sink: Sink) -> None:
        """Send what the socket takes now; `pending_bytes` says what is left."""
        while self._queue:
            offered = list(islice(self._queue, _BUFFERS_PER_CALL))
            sent = _sendmsg(sink, offered)
            self.sent_bytes += sent
            self._drop(sent)
            if sent < sum(map(len, offered)):
                return

    def _append(self, buffers: Sequence[Buffer]) -> None:
        self._queue.extend(memoryview(buffer) for buffer in buffers)
        self.pending_bytes += sum(map(len, buffers))

    def _drop(self, sent: int) -> None:
        """Forget the first `sent` bytes."""
        queue = self._queue
        self.pending_bytes -= sent
        while queue and sent >= len(queue[0]):
            sent -= len(queue.popleft())
        if sent:
            queue[0] = queue[0][sent:]


def _sendmsg(sink: Sink, buffers: Sequence[Buffer]) -> int:
    try:
        return sink.sendmsg(buffers)
    except BlockingIOError:
        return 0

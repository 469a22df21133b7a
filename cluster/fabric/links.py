"""The router's end of one connection, once it is open (`open_link`): what is sent, and the calls that are answered.

A link ends once: with an error that all its open calls get. Knows no selector and no choice of replicas.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from cluster.errors import FabricError, FrameError, ReplicaLostError
from cluster.fabric.frame_io import FrameReader, FrameWriter
from cluster.fabric.frames import (
    DTYPES,
    HEADER_BYTES,
    TRACED,
    Buffer,
    Frame,
    HeaderCheck,
    Kind,
    Limits,
    Status,
    encode,
    lead,
)
from cluster.fabric.mailbox import Mailbox
from cluster.fabric.transport import Batch


class StreamCall:
    """One batch on its way; see `transport.Call`.

    kind: ROWS or REFERENCE. batch: of rows, which may say where their results go. rows, hidden, dtype: of the rows sent
    and of the result. done: there is a result or an error. arrival: rises by order of being done, 0 before. frame: the
    answer, where it came by socket. memory: the result, where it lies outside of it. forgotten: nobody will ask for it.
    """

    __slots__ = (
        "arrival",
        "batch",
        "compute_s",
        "done",
        "dtype",
        "error",
        "forgotten",
        "frame",
        "hidden",
        "kind",
        "memory",
        "queue_rows",
        "replica_id",
        "rows",
        "sequence",
    )

    transport = "stream"

    def __init__(
        self,
        sequence: int,
        replica_id: str,
        kind: Kind,
        rows: int,
        hidden: int,
        dtype: torch.dtype,
        batch: Batch | None = None,
    ) -> None:
        self.sequence = sequence
        self.replica_id = replica_id
        self.kind = kind
        self.batch = batch
        self.rows = rows
        self.hidden = hidden
        self.dtype = dtype
        self.done = False
        self.arrival = 0
        self.queue_rows = 0
        self.compute_s = 0.0
        self.forgotten = False
        self.error: FabricError | None = None
        self.frame: Frame | None = None
        self.memory: Buffer | bytearray | None = None

    def result(self) -> Tensor:
        """[R, H], a view of the buffer it was received in.

        Raises:
            FabricError: `error`, or the call is not done, or it was answered with a reference.
        """
        if self.memory is not None:
            return torch.frombuffer(self.memory, dtype=self.dtype).view(self.rows, self.hidden)
        if self.frame is not None and self.frame.tensor is not None:
            return self.frame.tensor
        raise self.error or FabricError("the call has no result yet, or a reference instead of rows.")

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
    """An authenticated connection to one replica. `leaving`: it said GOAWAY. `events`: what its selector waits for.

    rows_leads: of the frames it sends, by dtype. mailbox: where the replica runs on this node. mailed: the call whose
    batch lies there, until it is answered. mailed_bytes, collected_bytes: what went that way.
    """

    __slots__ = (
        "calls",
        "collected_bytes",
        "digest8",
        "events",
        "leaving",
        "mail_check",
        "mailbox",
        "mailed",
        "mailed_bytes",
        "reader",
        "replica_id",
        "rows_leads",
        "sock",
        "writer",
    )

    def __init__(
        self,
        sock: socket.socket,
        replica_id: str,
        reader: FrameReader,
        writer: FrameWriter,
        digest8: bytes,
        limits: Limits,
        mailbox: Mailbox | None,
    ) -> None:
        self.sock = sock
        self.replica_id = replica_id
        self.reader = reader
        self.writer = writer
        self.digest8 = digest8
        self.leaving = False
        self.events = 0
        self.calls: dict[int, StreamCall] = {}
        self.mailbox = mailbox
        self.mailed: StreamCall | None = None
        self.mailed_bytes = self.collected_bytes = 0
        self.rows_leads = {dtype: lead(Kind.ROWS, dtype, 0, digest8) for dtype in DTYPES}
        self.mail_check = HeaderCheck(replace(limits, codes=frozenset({Kind.RESULT.value})), digest8)
        reader.place = self._place

    def mail(self, call: StreamCall, batch: Batch, payload: Buffer, deadline_ms: int) -> bool:
        """Put `batch`, with the rows `payload`, into the mailbox; False where it must go by the socket."""
        mailbox, front = self.mailbox, self.rows_leads.get(call.dtype)
        if mailbox is None or self.mailed is not None or front is None:
            return False
        shape, counts, trace = (call.rows, call.hidden), batch.counts, batch.trace
        if trace:
            front = lead(Kind.ROWS, call.dtype, 0, self.digest8, TRACED)
        written = mailbox.request.write_rows(
            front, call.sequence, batch.layer, shape, deadline_ms, counts, payload, trace
        )
        if not written:
            return False
        self.mailed = call
        self.mailed_bytes += HEADER_BYTES + len(trace) + counts.nbytes + len(payload)
        mailbox.ring()
        return True

    def collect(self) -> StreamCall | None:
        """The call whose result the bell announces; None where nobody asked.

        Raises:
            FrameError: what lies there is no answer to it.
        """
        call = self.mailed
        if call is None or self.mailbox is None:
            return None
        letter = self.mailbox.result.read(self.mail_check)
        frame, payload, batch = letter.frame, letter.payload, call.batch
        if frame.sequence != call.sequence or not call.fits(frame):
            raise FrameError("a result in the mailbox that answers another batch.")
        self.mailed = None
        self.collected_bytes += HEADER_BYTES + len(payload)
        if batch is not None and batch.into is not None:
            batch.into[:] = payload
            batch.placed = True
            call.memory = batch.into
        elif batch is not None:
            call.memory = bytearray(payload)
        # A replica that answers by socket, too, must not write where the result lies.
        self.reader.divert(call.sequence)
        self._settle(call, frame)
        return call

    def collect_last(self) -> StreamCall | None:
        """The call whose result lies in the mailbox of a connection that has ended, its bell perhaps not heard yet."""
        if (
            self.mailed is not None
            and self.mailbox is not None
            and self.mailbox.result.sequence == self.mailed.sequence
        ):
            with suppress(FrameError):
                return self.collect()
        return None

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
            if call is not None and (frame.placed or call.fits(frame)):
                call.frame = frame
                if frame.placed and call.batch is not None:
                    call.batch.placed = True
                    call.memory = call.batch.into
            elif call is not None and frame.kind is Kind.ERROR:
                error = FabricError if frame.status == Status.FAILED else ReplicaLostError
                call.error = error(f"{self.replica_id}: {_text(frame)}")
            else:
                self._heed(frame)
                continue
            if call is self.mailed:
                self.mailed = None
            self._settle(call, frame)
            answered.append(call)

    def _settle(self, call: StreamCall, frame: Frame) -> None:
        call.queue_rows = frame.queue_rows
        call.compute_s = frame.compute_us / 1e6
        del self.calls[call.sequence]

    def close(self) -> None:
        """Close the socket and the mailbox."""
        self.sock.close()
        self.reader.place = None  # which names this link: the two would keep each other alive
        if self.mailbox is not None:
            self.mailbox.close()
            self.mailbox = None  # its memory is not to wait until somebody collects the link

    def forget(self, call: StreamCall) -> None:
        """The result of `call` is not wanted, and where it was to go belongs to others from now on."""
        call.batch = None
        self.reader.divert(call.sequence)

    def _place(self, frame: Frame) -> memoryview | None:
        """Where the sender of the call wants its result, which has been received no further than its header."""
        call = self.calls.get(frame.sequence)
        if call is None or call.batch is None or call.batch.into is None or not call.fits(frame):
            return None
        return call.batch.into

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


def _text(frame: Frame) -> str:
    return bytes(frame.data).decode("utf-8", "replace")

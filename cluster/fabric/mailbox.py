"""Shared memory of one connection between processes of one node: small batches lie there, a bell tells that they do.

    area      request: header | trace context | counts | payload   one at a time, written by the router
              result:  header | payload                            written by the replica, before the next request
    bells     two eventfds, one heard by each side

A frame is the same as on the socket, only that its payload begins at a multiple of 64 bytes. What does not fit, comes
while a request is open, or is no ROWS or RESULT frame goes by the socket, which also tells when the other side dies.
Sending costs a copy and one small system call instead of a socket's copies in and out; a replica computes on the rows
where they lie.

The area is a sealed memfd: it has no name, goes with its last user, and cannot be cut short under the other side's
feet. Its order of writes is that of the CPU, which only x86 guarantees to be the program's: elsewhere there is none.

Both ends have proved the cluster key, and as far as availability goes they trust each other: whoever holds a bell can
fill its counter, so that it rings no more, or ring without end. What lies in the area is checked all the same.
The idea is that of any shared-memory channel; Ray's compiled graphs and vLLM's message queue have one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import FrameError
from cluster.fabric.frames import (
    HEADER_BYTES,
    LEAD_BYTES,
    MAX_U32,
    WHOLE,
    Buffer,
    Frame,
    HeaderCheck,
    Kind,
    check_counts,
    check_trace,
    lead,
)

AREA_BYTES = 2 << 20
"""Of requests, and as much of results. Only pages that were used once take memory."""
SUPPORTED = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
FILES = 3
_LINE = 64
_SHAPES = 512
_MAX_LAYER = (1 << 16) - 1
_BELL = "anon_inode:[eventfd]"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Letter:
    """A frame that was read, its payload in place; `frame.tensor` is a view of that where it is a request.

    The next frame of the same shape is the same object with other numbers in it: what is the same is checked and
    looked up once, and nobody looks at a frame any more when the next one may come.
    """

    __slots__ = ("_copy", "_counts_here", "_trace_here", "_values", "frame", "payload")

    def __init__(self, frame: Frame, memory: memoryview) -> None:
        counts_at = HEADER_BYTES + frame.trace_bytes
        start = _payload_at(frame.n_counts, frame.trace_bytes)
        self.frame = frame
        self.payload = memory[start : start + frame.payload_bytes]
        frame.mailed = True
        if frame.kind is Kind.ROWS and frame.dtype is not None:
            frame.tensor = torch.frombuffer(self.payload, dtype=frame.dtype).view(frame.rows, frame.hidden)
            frame.counts = torch.empty(frame.n_counts, dtype=torch.int64)
            self._values = frame.counts.numpy()
            self._copy = self._values.data.cast("B")
            self._counts_here = memory[counts_at : counts_at + 8 * frame.n_counts]
            self._trace_here = memory[HEADER_BYTES:counts_at]

    def read_counts(self) -> None:
        """Copy them, and the trace context, before they are checked: the other side could change them afterwards.

        Raises:
            FrameError: see `frames.check_counts` and `frames.check_trace`.
        """
        if self.frame.trace_bytes:
            self.frame.trace = check_trace(bytes(self._trace_here))
        self._copy[:] = self._counts_here
        check_counts(self._values.tolist(), self.frame.rows)


class Area:
    """One direction of a mailbox: room for one frame."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._letters: dict[tuple[bytes, int, int, int, int], Letter] = {}
        self._forms: dict[tuple[int, int, torch.dtype | None], tuple[bytes, Tensor]] = {}

    def write_rows(
        self,
        front: bytes,
        sequence: int,
        layer: int,
        shape: tuple[int, int],
        deadline_ms: int,
        counts: npt.NDArray[np.int64],
        payload: Buffer,
        trace: bytes = b"",
    ) -> bool:
        """A ROWS frame with the given lead; False where it has no room, or its layer none in a header."""
        memory, n, size = self._memory, len(counts), len(payload)
        head = trace + counts.tobytes() if trace else counts.tobytes()
        start = _payload_at(n, len(trace))
        if start + size > len(memory) or layer > _MAX_LAYER:
            return False
        memory[start : start + size] = payload
        memory[HEADER_BYTES : HEADER_BYTES + len(head)] = head
        WHOLE.pack_into(memory, 0, front, sequence, layer, *shape, deadline_ms, 0, 0, n, size)
        return True

    def write_result(self, request: Frame, output: Tensor, digest8: bytes, queue_rows: int, compute_us: int) -> None:
        """The RESULT frame that answers `request`, which came by the other area: so there is room for it."""
        rows, hidden = request.rows, request.hidden
        key = (rows, hidden, request.dtype)
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self._form(request, digest8)
        front, place = form
        place.copy_(output)
        size = request.payload_bytes
        WHOLE.pack_into(
            self._memory, 0, front, request.sequence, 0, rows, hidden, 0, queue_rows, min(compute_us, MAX_U32), 0, size
        )

    @property
    def sequence(self) -> int:
        """That of the frame which lies here, 0 before the first; its payload was written before its header."""
        return int.from_bytes(self._memory[LEAD_BYTES : LEAD_BYTES + 8], "little")

    def read(self, check: HeaderCheck) -> Letter:
        """What lies here.

        Raises:
            FrameError: the header is out of bounds, what it announces does not fit here, or its counts do not add up.
        """
        header = WHOLE.unpack_from(self._memory)
        front, sequence, layer, rows, hidden, deadline_ms, queue_rows, compute_us, n, size = header
        key = (front, rows, hidden, n, size)
        letter = self._letters.get(key)
        if letter is None:
            letter = self._admit(WHOLE.pack(*header), check)
            self._letters[key] = letter
        frame = letter.frame
        frame.sequence, frame.layer, frame.deadline_ms = sequence, layer, deadline_ms
        frame.queue_rows, frame.compute_us = queue_rows, compute_us
        if n:
            letter.read_counts()
        return letter

    def _admit(self, header: bytes, check: HeaderCheck) -> Letter:
        """The first letter of a shape. header: a copy, which the other side cannot change."""
        frame = check.parse(memoryview(header), 0)
        if _payload_at(frame.n_counts, frame.trace_bytes) + frame.payload_bytes > len(self._memory):
            raise FrameError(f"{frame.payload_bytes} payload bytes in a mailbox of {len(self._memory)}.")
        if len(self._letters) >= _SHAPES:
            self._letters.clear()
        return Letter(frame, self._memory)

    def _form(self, request: Frame, digest8: bytes) -> tuple[bytes, Tensor]:
        if len(self._forms) >= _SHAPES:
            self._forms.clear()
        start = _payload_at(0)
        payload = self._memory[start : start + request.payload_bytes]
        place = torch.frombuffer(payload, dtype=request.dtype or torch.uint8).view(request.rows, request.hidden)
        return lead(Kind.RESULT, request.dtype, 0, digest8), place


class Mailbox:
    """One end of a mailbox. files: descriptors of the area and of the bells of the router and of the replica."""

    def __init__(self, files: Sequence[int], *, own_bell: int, other_bell: int) -> None:
        self.files = tuple(files)
        self.bell = own_bell
        self._other_bell = other_bell
        memory = memoryview(mmap.mmap(files[0], 2 * AREA_BYTES))
        self.request = Area(memory[:AREA_BYTES])
        self.result = Area(memory[AREA_BYTES:])

    @classmethod
    def create(cls) -> Mailbox:
        """The replica's end.

        Raises:
            OSError: the system has no room for it.
        """
        area = os.memfd_create("expertscale", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        files = [area]
        try:
            os.ftruncate(area, 2 * AREA_BYTES)
            fcntl.fcntl(area, fcntl.F_ADD_SEALS, _SEALS)
            for _ in range(FILES - 1):  # one by one: what there is already is closed where the next one fails
                files.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            return cls(files, own_bell=files[2], other_bell=files[1])
        except OSError:
            _close(files)
            raise

    @classmethod
    def adopt(cls, files: Sequence[int]) -> Mailbox | None:
        """The router's end of what a replica sent along; None where that is no sealed area of the right size and two
        bells: no other file can be trusted to be quick to write to, or be waited for at all.
        """
        try:
            sealed = fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
            bells = [os.readlink(f"/proc/self/fd/{file}") for file in files[1:]]
            if sealed and bells == [_BELL] * (FILES - 1) and os.fstat(files[0]).st_size == 2 * AREA_BYTES:
                return cls(files, own_bell=files[1], other_bell=files[2])
        except OSError:
            pass
        _close(files)
        return None

    def ring(self) -> None:
        """Tell the other side that there is something to read."""
        try:  # noqa: SIM105  `suppress` costs as much as the call
            os.eventfd_write(self._other_bell, 1)
        except BlockingIOError:
            pass  # its counter is full, which takes 2^64 - 2 rings or an end that fills it: this one goes unheard

    def close(self) -> None:
        """Forget the bells. The memory goes when nobody looks at it any more. Idempotent."""
        files, self.files = self.files, ()
        _close(files)


def _payload_at(n_counts: int, trace_bytes: int = 0) -> int:
    return -(-(HEADER_BYTES + trace_bytes + 8 * n_counts) // _LINE) * _LINE


def _close(files: Sequence[int]) -> None:
    for file in files:
        with suppress(OSError):
            os.close(file)

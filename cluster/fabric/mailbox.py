"""Shared memory of one connection between processes of one node: small batches lie there, a bell tells that they do.

    area      request: header | counts | payload      one at a time, written by the router
              result:  header | payload               written by the replica, before the next request comes
    bells     two eventfds, one heard by each side

A frame is the same as on the socket, only that its payload begins at a multiple of 64 bytes. What does not fit, comes
while a request is open, or is no ROWS or RESULT frame goes by the socket, which also tells when the other side dies.
Sending costs a copy and one small system call instead of a socket's copies in and out; a replica computes on the rows
where they lie.

The area is a sealed memfd: it has no name, goes with its last user, and cannot be cut short under the other side's
feet. Its order of writes is that of the CPU, which only x86 guarantees to be the program's: elsewhere there is none.
The idea is that of any shared-memory channel; Ray's compiled graphs and vLLM's message queue have one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from cluster.errors import FrameError
from cluster.fabric.frames import HEADER_BYTES, Buffer, Frame, HeaderCheck

AREA_BYTES = 2 << 20
"""Of requests, and as much of results. Only pages that were used once take memory."""
SUPPORTED = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
FILES = 3
_LINE = 64
_VIEWS = 512
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Area:
    """One direction of a mailbox: room for one frame."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._counts: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def fits(self, n_counts: int, payload_bytes: int) -> bool:
        """Whether a frame of this size has room."""
        return _payload_at(n_counts) + payload_bytes <= len(self._memory)

    def write(self, header: Buffer, n_counts: int, payload: Buffer) -> None:
        """A header, with `n_counts` counts behind it, and its payload."""
        memory, start = self._memory, _payload_at(n_counts)
        memory[start : start + len(payload)] = payload
        memory[: len(header)] = header

    def read(self, check: HeaderCheck) -> tuple[Frame, memoryview]:
        """The frame without counts and tensor, and its payload, in place.

        Raises:
            FrameError: the header is out of bounds, or what it announces does not fit here.
        """
        memory = self._memory
        frame = check.parse(memory, 0)
        start = _payload_at(frame.n_counts)
        stop = start + frame.payload_bytes
        if stop > len(memory):
            raise FrameError(f"{frame.payload_bytes} payload bytes in a mailbox of {len(memory)}.")
        return frame, memory[start:stop]

    def counts(self, frame: Frame) -> Tensor:
        """int64 [E], a copy that the next frame overwrites. Raises FrameError like `frames.read_counts`."""
        n = frame.n_counts
        counts = self._memory[HEADER_BYTES : HEADER_BYTES + 8 * n].cast("q").tolist()
        if min(counts) < 0 or sum(counts) != frame.rows:
            raise FrameError(f"counts that sum to {sum(counts)} for {frame.rows} rows, the smallest {min(counts)}.")
        held = self._counts.get(n)
        if held is None:
            held = self._counts[n] = torch.empty(n, dtype=torch.int64)
        held.numpy()[:] = counts
        return held

    def tensor(self, frame: Frame, payload: memoryview) -> Tensor:
        """The payload as rows [R, H], in place."""
        dtype = frame.dtype or torch.uint8
        key = (frame.n_counts, frame.rows, frame.hidden, dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            view = torch.frombuffer(payload, dtype=dtype).view(frame.rows, frame.hidden)
            self._views[key] = view
        return view


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
            files += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            return cls(files, own_bell=files[2], other_bell=files[1])
        except OSError:
            _close(files)
            raise

    @classmethod
    def adopt(cls, files: Sequence[int]) -> Mailbox | None:
        """The router's end of what a replica sent along; None where that is no sealed area of the right size."""
        try:
            sealed = fcntl.fcntl(files[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if len(files) == FILES and sealed and os.fstat(files[0]).st_size == 2 * AREA_BYTES:
                return cls(files, own_bell=files[1], other_bell=files[2])
        except OSError:
            pass
        _close(files)
        return None

    def ring(self) -> None:
        """Tell the other side that there is something to read."""
        with suppress(BlockingIOError):  # it has been rung 2^64 - 2 times without being heard: it will be heard
            os.eventfd_write(self._other_bell, 1)

    def close(self) -> None:
        """Forget the bells. The memory goes when nobody looks at it any more. Idempotent."""
        files, self.files = self.files, ()
        _close(files)


def _payload_at(n_counts: int) -> int:
    return -(-(HEADER_BYTES + 8 * n_counts) // _LINE) * _LINE


def _close(files: Sequence[int]) -> None:
    for file in files:
        with suppress(OSError):
            os.close(file)

"""The wire format: a fixed little-endian header, counts per expert, a payload; every field checked before it is used.

    header (59 bytes) | trace context (24 bytes, only where a flag says so) | counts int64 [n_counts] | payload

Knows no socket (`frame_io` reads and writes), no handshake, no replica. Nothing is unpickled; nothing is allocated
before the header has passed every bound. Own format; fixed header and length-prefixed body as in any RPC framing.
Dimension letters: R rows, H hidden, E experts of the group in that layer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import FrameError
from cluster.fabric import WIRE_VERSION
from cluster.fabric.words import as_words

MAGIC = b"EXSF"
_PREFIX = MAGIC + bytes([WIRE_VERSION])
_LEAD = struct.Struct("<5sBBBB8s")
_FIELDS = struct.Struct("<QHIIIIIIQ")
HEADER = struct.Struct("<5sBBBB8sQHIIIIIIQ")
"""The lead (magic and wire version, kind, dtype, status, flags, digest) and the numbers behind it."""
WHOLE = struct.Struct("<17sQHIIIIIIQ")
"""The same bytes, the lead in one piece: it need not be looked into where it is a known one."""
HEADER_BYTES = HEADER.size
LEAD_BYTES = _LEAD.size
TRACE_BYTES = 24
"""A trace context: 16 bytes of the trace's id, 8 of the span below which rows are computed. Neither is all zeros."""
TRACED = 1
"""The one flag there is: a trace context follows the header. Frames without it pay nothing."""
STAGING_BYTES = 64 << 10
"""Header, trace context and counts of any allowed frame fit into this."""
MAX_U32 = (1 << 32) - 1
_LEADS = 64
_NO_DIGEST = bytes(8)
Buffer = bytes | memoryview


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    ROWS = 6
    RESULT = 7
    ERROR = 8
    GOAWAY = 9
    REFERENCE = 10
    RELEASE = 11
    PING = 12
    PONG = 13

    # That of enum members is Python code, and kinds are looked up with every frame.
    __hash__ = int.__hash__


class Status(IntEnum):
    """Why an ERROR frame was sent: the batch came late, failed, or lost its rows; or the connection is being closed."""

    OK = 0
    LATE = 1
    FAILED = 2
    LOST = 3
    CLOSING = 4


_KINDS: dict[int, Kind] = {kind.value: kind for kind in Kind}
_TRACED_KINDS = (Kind.ROWS, Kind.REFERENCE)
_CODES: dict[torch.dtype | None, int] = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Those of rows."""
_DTYPES: dict[int, tuple[torch.dtype | None, int]] = {
    code: (dtype, dtype.itemsize if dtype else 0) for dtype, code in _CODES.items()
}


@dataclass(frozen=True)
class Limits:
    """Bounds a header must respect before anything is allocated.

    rows: of one batch. payload_bytes: hidden states of one batch. control_bytes: any other payload. counts: experts of
    one group in one layer; they and the header must fit the staging buffer. codes: the kinds that are welcome, as plain
    integers (hashing an enum member runs Python code).
    """

    rows: int = 1 << 22
    payload_bytes: int = 256 << 20
    control_bytes: int = 16 << 20
    counts: int = 4096
    codes: frozenset[int] = frozenset(kind.value for kind in Kind)

    def __post_init__(self) -> None:
        most = (STAGING_BYTES - HEADER_BYTES - TRACE_BYTES) // 8
        if self.counts > most:
            raise FrameError(f"limit of {self.counts} counts: allowed are {most}.")


HANDSHAKE_LIMITS = Limits(
    rows=0,
    payload_bytes=0,
    control_bytes=1024,
    counts=0,
    codes=frozenset(
        kind.value for kind in (Kind.HELLO, Kind.CHALLENGE, Kind.PROOF, Kind.WELCOME, Kind.REFUSED, Kind.GOAWAY)
    ),
)
"""Before both sides have proved the key: small frames of the handshake, and a GOAWAY right behind WELCOME."""


@dataclass(slots=True)
class Frame:
    """One frame as received. `tensor` [R, H] for ROWS and RESULT, `data` for every other kind; `counts` int64 [E].

    n_counts, payload_bytes, trace_bytes: what follows the header. trace: the trace context, b"" without.
    placed: a socket's reader put the payload where it was told to. mailed: the frame came by mailbox, and its payload
    lies there.
    """

    kind: Kind
    sequence: int = 0
    status: int = 0
    layer: int = 0
    rows: int = 0
    hidden: int = 0
    dtype: torch.dtype | None = None
    deadline_ms: int = 0
    queue_rows: int = 0
    compute_us: int = 0
    n_counts: int = 0
    payload_bytes: int = 0
    trace_bytes: int = 0
    trace: bytes = b""
    counts: Tensor | None = None
    tensor: Tensor | None = None
    data: bytes | bytearray = b""
    placed: bool = False
    mailed: bool = False


def encode(
    kind: Kind,
    sequence: int = 0,
    *,
    digest8: bytes = _NO_DIGEST,
    status: int = 0,
    layer: int = 0,
    rows: int = 0,
    hidden: int = 0,
    dtype: torch.dtype | None = None,
    deadline_ms: int = 0,
    queue_rows: int = 0,
    compute_us: int = 0,
    counts: npt.NDArray[np.int64] | None = None,
    body: Tensor | Buffer = b"",
    trace: bytes = b"",
) -> list[Buffer]:
    """The buffers of one frame for `sendmsg`. The body is referred to, not copied, and must not change until the frame
    is sent. Only rows of a forgotten call may: header and counts are copies, so the stream stays in step, and whatever
    is computed from them is dropped by its sequence. The shape [R, H] and dtype of a tensor (contiguous, on the CPU)
    fill the header. `counts` is int64 [E]. trace: a trace context, or b"".

    Raises:
        FrameError: a field does not fit its place in the header, or the body has an unknown dtype.
    """
    payload: Buffer
    if isinstance(body, Tensor):
        rows, hidden = body.shape
        dtype = body.dtype
        payload = tensor_bytes(body)
    else:
        payload = body
    size = len(payload)
    try:
        header = lead(kind, dtype, status, digest8, TRACED if trace else 0) + _FIELDS.pack(
            sequence,
            layer,
            rows,
            hidden,
            deadline_ms if deadline_ms < MAX_U32 else MAX_U32,
            queue_rows,
            compute_us if compute_us < MAX_U32 else MAX_U32,
            0 if counts is None else len(counts),
            size,
        )
    except (struct.error, KeyError) as error:
        raise FrameError(f"a {kind.name} frame cannot be written: {error}.") from None
    if trace:
        header += check_trace(trace)
    if counts is not None:
        header += counts.tobytes()
    return [header, payload] if size else [header]


@lru_cache(maxsize=256)
def lead(kind: Kind, dtype: torch.dtype | None, status: int, digest8: bytes, flags: int = 0) -> bytes:
    """The first `LEAD_BYTES` of a header. Raises KeyError for a dtype, struct.error for a status without a code."""
    return _LEAD.pack(_PREFIX, kind, _CODES[dtype], status, flags, digest8)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous, non-empty CPU tensor of any dtype, not copied."""
    return as_words(tensor).data.cast("B")


class HeaderCheck:
    """What the headers of one connection must respect. What is always the same in them is looked at once.

    limits, digest8: as of `FrameReader`.
    """

    def __init__(self, limits: Limits, digest8: bytes | None) -> None:
        self._limits = limits
        self._digest8 = digest8
        # Only valid leads are kept, and few can be: kinds, dtypes and statuses, bounded in case a peer plays with them.
        self._leads: dict[bytes, _Lead] = {}

    def parse(self, data: memoryview, start: int) -> Frame:
        """The frame that the header at `start` announces, still without counts and payload.

        Raises:
            FrameError: the first field that is out of bounds.
        """
        front = bytes(data[start : start + LEAD_BYTES])
        known = self._leads.get(front)
        if known is None:
            known = _check_lead(front, self._limits, self._digest8)
            if len(self._leads) < _LEADS:
                self._leads[front] = known
        kind, status, dtype, item_bytes, holds_rows, size_limit, trace_bytes = known
        numbers = _FIELDS.unpack_from(data, start + LEAD_BYTES)
        sequence, layer, rows, hidden, deadline_ms, queue_rows, compute_us, n, size = numbers
        limits = self._limits
        if rows > limits.rows:
            raise FrameError(f"{rows} rows in one frame; at most {limits.rows} are allowed.")
        if n > limits.counts:
            raise FrameError(f"{n} counts in one frame; at most {limits.counts} are allowed.")
        if holds_rows or kind is Kind.REFERENCE:
            if not (rows and hidden and item_bytes):
                raise FrameError(f"a {kind.name} frame of {rows} rows of {hidden}, item size {item_bytes}.")
            if holds_rows and (n > 0) != (kind is Kind.ROWS):
                raise FrameError(f"a {kind.name} frame with {n} counts.")
            if holds_rows and size != rows * hidden * item_bytes:
                raise FrameError(f"{size} payload bytes for {rows} rows of {hidden} x {item_bytes} bytes.")
        elif rows or hidden or item_bytes or n:
            raise FrameError(f"a {kind.name} frame holds no rows.")
        if size > size_limit:
            raise FrameError(f"{size} payload bytes in a {kind.name} frame; that is more than is allowed.")
        frame = Frame(kind, sequence, status, layer, rows, hidden, dtype, deadline_ms, queue_rows, compute_us, n, size)
        frame.trace_bytes = trace_bytes
        return frame


_Lead = tuple[Kind, int, torch.dtype | None, int, bool, int, int]
"""kind, status, dtype, its bytes, whether a tensor follows, most payload bytes, bytes of the trace context."""


def _check_lead(front: bytes, limits: Limits, digest8: bytes | None) -> _Lead:
    prefix, code, dtype_code, status, flags, digest = _LEAD.unpack(front)
    if prefix != _PREFIX:
        if prefix[:4] != MAGIC:
            raise FrameError("these bytes are no frame of this cluster.")
        raise FrameError(f"the frame has wire version {prefix[4]}; this side speaks {WIRE_VERSION}.")
    kind = _KINDS.get(code)
    if kind is None or code not in limits.codes:
        raise FrameError(f"a frame of kind {code if kind is None else kind.name} is not expected here.")
    if digest8 is not None and digest != digest8:
        raise FrameError(f"the frame is for model digest {digest.hex()}...; this side serves {digest8.hex()}...")
    dtype, item_bytes = _DTYPES.get(dtype_code, (None, -1))
    if item_bytes < 0:
        raise FrameError(f"unknown dtype code {dtype_code}.")
    if flags and (flags != TRACED or kind not in _TRACED_KINDS):
        raise FrameError(f"a {kind.name} frame with flags {flags}; only rows and references may have one, {TRACED}.")
    holds_rows = kind is Kind.ROWS or kind is Kind.RESULT
    most = limits.payload_bytes if holds_rows else limits.control_bytes
    return kind, status, dtype, item_bytes, holds_rows, most, TRACE_BYTES if flags else 0


def check_trace(trace: bytes) -> bytes:
    """`trace` itself.

    Raises:
        FrameError: it is no trace context.
    """
    if len(trace) != TRACE_BYTES or not (any(trace[:16]) and any(trace[16:])):
        raise FrameError(f"a trace context needs {TRACE_BYTES} bytes, an id of 16 and one of 8, neither all zeros.")
    return trace


def read_counts(data: memoryview, rows: int) -> Tensor:
    """int64 [E] from the bytes behind a header.

    Raises:
        FrameError: a count is negative, or they do not sum to `rows`.
    """
    check_counts(data.cast("q"), rows)
    return torch.frombuffer(bytearray(data), dtype=torch.int64)


def check_counts(counts: Sequence[int], rows: int) -> None:
    """Raises:
    FrameError: a count is negative, or they do not sum to `rows`.
    """
    if min(counts) < 0 or sum(counts) != rows:
        raise FrameError(f"counts that sum to {sum(counts)} for {rows} rows, the smallest {min(counts)}.")


def allocate(frame: Frame) -> memoryview:
    """Give a checked `frame` the buffer of its payload and return the bytes of it."""
    if frame.kind is Kind.ROWS or frame.kind is Kind.RESULT:
        frame.tensor = torch.empty(frame.rows, frame.hidden, dtype=frame.dtype)
        return tensor_bytes(frame.tensor)
    data = bytearray(frame.payload_bytes)
    frame.data = data
    return memoryview(data)

"""Frames: what goes in comes out, and no bytes can crash, hang or bloat a reader. 6 s."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import FrameError
from cluster.fabric import WIRE_VERSION, frame_io
from cluster.fabric.frame_io import FrameReader, FrameWriter
from cluster.fabric.frames import (
    HANDSHAKE_LIMITS,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    TRACE_BYTES,
    TRACED,
    Buffer,
    Frame,
    Kind,
    Limits,
    encode,
    tensor_bytes,
)

DIGEST8 = b"model-no"
SMALL = Limits(rows=64, payload_bytes=4096, control_bytes=256, counts=16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRACE = bytes(range(1, TRACE_BYTES + 1))


@dataclass
class Chunks:
    """A stream that arrives in pieces of the given sizes, over and over; then it ends."""

    data: bytes
    sizes: Sequence[int] = (1 << 20,)
    reads: int = 0

    def recv_into(self, buffer: memoryview) -> int:
        size = min(self.sizes[self.reads % len(self.sizes)], len(buffer), len(self.data))
        self.reads += 1
        buffer[:size] = self.data[:size]
        self.data = self.data[size:]
        return size


def read_all(data: bytes, limits: Limits = SMALL, sizes: Sequence[int] = (1 << 20,)) -> list[Frame]:
    reader, source, frames = FrameReader(limits, DIGEST8), Chunks(data, sizes), []
    while source.data:
        frames += reader.receive(source)
    assert not reader.partial
    return frames


def joined(buffers: Sequence[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


@st.composite
def rows_frames(draw: st.DrawFn) -> tuple[bytes, Tensor, Tensor, bytes]:
    """(bytes, counts, rows, trace context or b"") of a valid ROWS frame."""
    counts = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any)))
    hidden, dtype = draw(st.integers(1, 9)), draw(st.sampled_from(DTYPES))
    rows = torch.arange(int(counts.sum()) * hidden, dtype=torch.float32).view(-1, hidden).to(dtype)
    ids = st.binary(min_size=16, max_size=16).filter(any), st.binary(min_size=8, max_size=8).filter(any)
    trace = draw(st.just(b"") | st.tuples(*ids).map(b"".join))
    buffers = encode(Kind.ROWS, 7, digest8=DIGEST8, layer=3, counts=counts.numpy(), body=rows, trace=trace)
    return joined(buffers), counts, rows, trace


@settings(max_examples=50)
@given(st.lists(rows_frames(), min_size=1, max_size=4), st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_rows_come_out_as_they_went_in_however_the_stream_is_cut(
    sent: list[tuple[bytes, Tensor, Tensor, bytes]], sizes: list[int]
) -> None:
    frames = read_all(b"".join(data for data, *_ in sent), sizes=sizes)
    assert len(frames) == len(sent)
    for frame, (_, counts, rows, trace) in zip(frames, sent, strict=True):
        assert frame.trace == trace
        assert frame.counts is not None
        assert frame.tensor is not None
        assert torch.equal(frame.counts, counts)
        assert torch.equal(frame.tensor, rows)
        assert frame.tensor.dtype == rows.dtype


def test_every_header_field_survives() -> None:
    data = joined(
        encode(
            Kind.REFERENCE,
            (1 << 64) - 1,
            digest8=DIGEST8,
            status=3,
            layer=(1 << 16) - 1,
            rows=5,
            hidden=6,
            dtype=torch.float16,
            deadline_ms=1234,
            queue_rows=77,
            compute_us=88,
            counts=np.array([2, 3]),
            body=b"reference",
            trace=TRACE,
        )
    )
    (frame,) = read_all(data)
    assert (frame.kind, frame.sequence, frame.status, frame.layer) == (Kind.REFERENCE, (1 << 64) - 1, 3, 65535)
    assert (frame.rows, frame.hidden, frame.dtype) == (5, 6, torch.float16)
    assert (frame.deadline_ms, frame.queue_rows, frame.compute_us) == (1234, 77, 88)
    assert frame.tensor is None
    assert bytes(frame.data) == b"reference"
    assert frame.trace == TRACE


def test_a_frame_of_an_untraced_step_is_as_long_as_its_header_counts_and_rows() -> None:
    sent = {"counts": np.array([2]), "body": torch.zeros(2, 3)}
    plain = joined(encode(Kind.ROWS, 1, **sent))
    assert len(plain) == HEADER_BYTES + 8 + 24
    assert len(joined(encode(Kind.ROWS, 1, **sent, trace=TRACE))) == len(plain) + TRACE_BYTES


@given(st.sampled_from([k for k in Kind if k not in (Kind.ROWS, Kind.RESULT, Kind.REFERENCE)]), st.binary(max_size=256))
def test_other_frames_carry_opaque_bytes(kind: Kind, data: bytes) -> None:
    (frame,) = read_all(joined(encode(kind, 1, digest8=DIGEST8, body=data)), sizes=(7,))
    assert (frame.kind, bytes(frame.data)) == (kind, data)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every payload size a reader allocates."""
    sizes: list[int] = []
    real = frame_io.allocate

    def recorded(frame: Frame) -> memoryview:
        buffer = real(frame)
        sizes.append(len(buffer))
        return buffer

    monkeypatch.setattr(frame_io, "allocate", recorded)
    return sizes


def feed(data: bytes, limits: Limits) -> None:
    """Read until the data ends or is refused; anything but FrameError is a failure."""
    reader, source = FrameReader(limits, DIGEST8), Chunks(data, (97,))
    with suppress(FrameError):
        while source.data:
            reader.receive(source)


@settings(max_examples=150)
@given(st.sampled_from([b"", MAGIC + bytes([WIRE_VERSION])]), st.binary(max_size=300))
def test_random_bytes_are_refused_or_waited_for(front: bytes, tail: bytes) -> None:
    for limits in (SMALL, HANDSHAKE_LIMITS):
        feed(front + tail, limits)


def test_mutated_frames_never_allocate_beyond_the_limits(allocations: list[int]) -> None:
    @settings(max_examples=250)
    @given(rows_frames(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
    def check(sent: tuple[bytes, Tensor, Tensor, bytes], changes: list[tuple[int, int]]) -> None:
        data = bytearray(sent[0])
        for position, value in changes:
            data[position % min(len(data), HEADER_BYTES + 64)] = value
        feed(bytes(data), SMALL)

    check()
    assert allocations
    assert max(allocations) <= SMALL.payload_bytes


def header(**changes: int | bytes) -> bytes:
    fields: dict[str, int | bytes] = {
        "prefix": MAGIC + bytes([WIRE_VERSION]),
        "kind": Kind.ROWS,
        "dtype": 1,
        "status": 0,
        "flags": 0,
        "digest": DIGEST8,
        "sequence": 1,
        "layer": 0,
        "rows": 2,
        "hidden": 3,
        "deadline_ms": 0,
        "queue_rows": 0,
        "compute_us": 0,
        "n_counts": 2,
        "payload_bytes": 24,
    }
    return HEADER.pack(*(fields | changes).values()) + struct.pack("<2q", 1, 1) + bytes(24)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prefix": b"HTTP/"}, "no frame of this cluster"),
        ({"prefix": MAGIC + b"\1"}, "wire version 1; this side speaks 2"),
        ({"kind": 99}, "kind 99"),
        ({"dtype": 9}, "dtype code 9"),
        ({"dtype": 0}, "item size 0"),
        ({"digest": b"another!"}, "model digest"),
        ({"flags": 2}, "a ROWS frame with flags 2"),
        ({"flags": 3}, "a ROWS frame with flags 3"),
        ({"flags": 1, "kind": Kind.RESULT, "n_counts": 0}, "a RESULT frame with flags 1"),
        ({"rows": 65, "payload_bytes": 65 * 12}, "65 rows"),
        ({"rows": 0, "payload_bytes": 0}, "0 rows"),
        ({"hidden": 600, "payload_bytes": 4800}, "4800 payload bytes in a ROWS frame; that is more"),
        ({"n_counts": 17}, "17 counts"),
        ({"n_counts": 0}, "0 counts"),
        ({"n_counts": 1}, "sum to 1 for 2 rows"),
        ({"payload_bytes": 23}, "23 payload bytes for 2 rows"),
        ({"payload_bytes": (1 << 64) - 1}, "payload bytes for 2 rows"),
        ({"kind": Kind.PING}, "holds no rows"),
        (
            {"kind": Kind.GOAWAY, "rows": 0, "hidden": 0, "dtype": 0, "n_counts": 0, "payload_bytes": 257},
            "257 payload bytes in a GOAWAY",
        ),
    ],
)
def test_each_bound_is_refused_with_its_reason(changes: dict[str, int | bytes], reason: str) -> None:
    assert read_all(header())[0].rows == 2
    with pytest.raises(FrameError, match=reason):
        read_all(header(**changes))


@pytest.mark.parametrize("trace", [bytes(TRACE_BYTES), bytes(16) + TRACE[16:], TRACE[:16] + bytes(8)])
def test_a_trace_context_of_zeros_is_refused_on_both_sides(trace: bytes) -> None:
    rest = header()[HEADER_BYTES:]
    traced = header(flags=TRACED)[:HEADER_BYTES]
    assert read_all(traced + TRACE + rest)[0].trace == TRACE
    with pytest.raises(FrameError, match="a trace context needs 24 bytes"):
        read_all(traced + trace + rest)
    with pytest.raises(FrameError, match="a trace context needs 24 bytes"):
        encode(Kind.ROWS, 1, counts=np.array([1]), body=torch.zeros(1, 1), trace=trace)


@pytest.mark.parametrize("counts", [(-1, 3), (1, 2), (1 << 62, 1 << 62)])
def test_counts_must_sum_to_the_rows_and_none_be_negative(counts: tuple[int, int]) -> None:
    data = header()[:HEADER_BYTES] + struct.pack("<2q", *counts) + bytes(24)
    with pytest.raises(FrameError, match="counts that sum"):
        read_all(data)


def test_a_stranger_may_send_no_rows() -> None:
    with pytest.raises(FrameError, match="ROWS is not expected"):
        read_all(header(), HANDSHAKE_LIMITS)


def test_the_end_of_the_stream_is_an_error_of_the_connection() -> None:
    with pytest.raises(ConnectionResetError):
        FrameReader(SMALL).receive(Chunks(b""))


@pytest.mark.parametrize(("body", "layer"), [(torch.zeros(1, 1, dtype=torch.float64), 0), (torch.zeros(1, 1), 1 << 16)])
def test_what_does_not_fit_a_header_is_not_encoded(body: Tensor, layer: int) -> None:
    with pytest.raises(FrameError, match="ROWS frame cannot be written"):
        encode(Kind.ROWS, 1, digest8=DIGEST8, layer=layer, counts=np.array([1]), body=body)


def test_limits_that_exceed_the_staging_buffer_are_refused() -> None:
    with pytest.raises(FrameError, match="counts"):
        Limits(counts=1 << 20)


def test_a_payload_is_sent_from_where_it_lies() -> None:
    rows = torch.zeros(4, 4, dtype=torch.bfloat16)
    buffers = encode(Kind.RESULT, 1, body=rows)
    rows.fill_(1.0)
    assert bytes(buffers[-1]) == bytes(tensor_bytes(rows)) != bytes(32)


def test_a_large_payload_is_received_where_it_stays() -> None:
    rows = torch.randn(256, 1024)
    data = joined(encode(Kind.ROWS, 1, digest8=DIGEST8, counts=np.array([256]), body=rows))
    targets: list[memoryview] = []

    class Recorded(Chunks):
        def recv_into(self, buffer: memoryview) -> int:
            targets.append(buffer)
            return super().recv_into(buffer)

    reader, source = FrameReader(Limits(), DIGEST8), Recorded(data)
    assert reader.receive(source) == []
    (frame,) = reader.receive(source)
    assert frame.tensor is not None
    assert torch.equal(frame.tensor, rows)
    where = torch.frombuffer(targets[1], dtype=torch.uint8).data_ptr()
    assert 0 < where - frame.tensor.data_ptr() <= 64 << 10


@dataclass
class Sink:
    """Takes the given numbers of bytes, one a call; a 0 is a full socket."""

    takes: list[int]
    data: bytearray = field(default_factory=bytearray)

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        take = self.takes.pop(0) if self.takes else 1 << 20
        if not take:
            raise BlockingIOError
        sent = joined(buffers)[:take]
        self.data += sent
        return len(sent)


@given(st.lists(st.lists(st.binary(max_size=9), max_size=4), max_size=6), st.lists(st.integers(0, 12), max_size=20))
def test_a_writer_keeps_the_order_whatever_the_socket_takes(frames: list[list[bytes]], takes: list[int]) -> None:
    writer, sink = FrameWriter(), Sink(takes)
    for buffers in frames:
        writer.send(sink, buffers)
    while writer.pending_bytes:
        writer.flush(sink)
    assert bytes(sink.data) == b"".join(map(joined, frames))
    assert writer.sent_bytes == len(sink.data)

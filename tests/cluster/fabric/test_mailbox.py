"""The mailbox between a router and a replica of one node: what goes through it, what does not, nonsense. 1 s."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import FabricError, ReplicaLostError
from cluster.fabric.frames import TRACED, WHOLE, Frame, Kind, Status, encode, lead
from cluster.fabric.mailbox import AREA_BYTES, SUPPORTED, Mailbox
from cluster.fabric.server import ExpertServer
from cluster.fabric.transport import Batch
from tests.cluster.fabric.serving import (
    DIGEST,
    HIDDEN,
    WAIT_S,
    Gate,
    Wire,
    answered,
    batch,
    expected,
    finished,
    impostor,
    kept_files,
    open_files,
    serving,
    times_expert,
    transport,
    unheard,
    until,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="there is no mailbox on this system")
DIGEST8 = DIGEST[:8]


# -- what goes through it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_go_and_results_come_bit_for_bit(dtype: torch.dtype, placed: bool) -> None:
    words = torch.int32 if dtype is torch.float32 else torch.int16
    # Not a number in any of the ways there are, infinite, denormal: bytes are moved, not values.
    bits = torch.randint(torch.iinfo(words).min, torch.iinfo(words).max, (6, HIDDEN), dtype=words)
    with serving(lambda _layer, _counts, rows: rows.clone(), dtype=dtype) as (_, replica), transport() as stream:
        for counts in ((1, 2, 3), (0, 4, 0), (1, 2, 3)):
            rows = sum(counts)
            into = memoryview(bytearray(rows * HIDDEN * dtype.itemsize)) if placed else None
            sent = Batch("experts-0", 0, np.array(counts), np.arange(rows), bits[:rows].view(dtype), into=into)
            call = stream.send(replica, sent, WAIT_S)
            finished(stream, [call])
            assert torch.equal(call.result().view(words), bits[:rows])
            assert into is None or bytes(into) == bits[:rows].numpy().tobytes()
        link = stream._links[replica.id]
        assert link.mailed_bytes > 16 * HIDDEN * dtype.itemsize
        assert link.collected_bytes > 16 * HIDDEN * dtype.itemsize


def test_results_of_one_shape_do_not_overwrite_each_other() -> None:
    with serving() as (_, replica), transport() as stream:
        sent = [batch(), batch()]
        calls = []
        for part in sent:
            calls.append(stream.send(replica, part, WAIT_S))
            finished(stream, calls[-1:])
        for call, part in zip(calls, sent, strict=True):
            assert torch.equal(call.result(), expected(part))


def test_a_batch_that_has_no_room_goes_by_the_socket() -> None:
    with serving(hidden=4096) as (_, replica), transport() as stream:
        link = answered(stream, replica, batch((100, 100, 0), hidden=4096))
        assert (link.mailed_bytes, link.collected_bytes) == (0, 0)
        assert answered(stream, replica, batch(hidden=4096)).collected_bytes > 3 * 4096 * 4


def test_a_second_call_while_one_is_open_goes_by_the_socket() -> None:
    gate = Gate()
    with serving(gate) as (_, replica), transport() as stream:
        sent = [batch(), batch(layer=1)]
        first = stream.send(replica, sent[0], WAIT_S)
        link = stream._links[replica.id]
        mailed, by_socket = link.mailed_bytes, link.writer.sent_bytes
        second = stream.send(replica, sent[1], WAIT_S)
        assert (link.mailed, link.mailed_bytes) == (first, mailed)
        assert link.writer.sent_bytes > by_socket
        gate.open.set()
        finished(stream, [first, second])
        for call, part in zip((first, second), sent, strict=True):
            assert torch.equal(call.result(), expected(part))


def test_a_forgotten_calls_result_reaches_nobody_and_the_mailbox_is_free_afterwards() -> None:
    gate = Gate()
    with serving(gate) as (_, replica), transport() as stream:
        into = memoryview(bytearray(3 * HIDDEN * 4))
        forgotten = batch()
        forgotten.into = into
        call = stream.send(replica, forgotten, WAIT_S)
        stream.forget(call)
        gate.open.set()
        link = stream._links[replica.id]
        while link.mailed is not None:
            stream.wait([], 0.01)
        assert bytes(into) == bytes(len(into))
        assert not forgotten.placed
        mailed = link.mailed_bytes
        answered(stream, replica, batch())
        assert link.mailed_bytes > mailed


def test_an_error_of_the_experts_frees_the_mailbox() -> None:
    def compute(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        if layer == 1:
            raise RuntimeError("out of luck")
        return times_expert(layer, counts, rows)

    with serving(compute) as (_, replica), transport() as stream:
        for _ in range(2):
            call = stream.send(replica, batch(layer=1), WAIT_S)
            assert stream._links[replica.id].mailed is call
            finished(stream, [call])
            with pytest.raises(FabricError, match="out of luck"):
                call.result()
            answered(stream, replica, batch())


def test_a_draining_replica_answers_what_lies_in_the_mailbox() -> None:
    gate = Gate()
    with serving(gate) as (server, replica), transport() as stream:
        sent = batch()
        call = stream.send(replica, sent, WAIT_S)
        assert gate.entered.wait(WAIT_S)
        assert not server.drain(0.0)
        gate.open.set()
        finished(stream, [call])
        assert torch.equal(call.result(), expected(sent))
        assert server.drain(WAIT_S)


def test_routers_of_other_nodes_have_no_mailbox() -> None:
    with serving(tcp=True) as (server, replica), transport(node_id="another-node") as stream:
        assert answered(stream, replica, batch()).mailbox is None
        assert all(connection.mailbox is None for connection in server._connections.routers)


def mapped_areas() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:expertscale")


def test_files_and_memory_go_with_the_connection() -> None:
    with serving() as (server, replica):
        gc.collect()  # what earlier tests left
        before = kept_files(), mapped_areas()
        for _ in range(3):
            with transport() as stream:
                answered(stream, replica, batch())
                assert mapped_areas() > before[1]
            del stream
            until(lambda: server.stats().connections == 0)
        # Without a collection: both go as soon as nobody uses them.
        until(lambda: (open_files(), mapped_areas()) == before)


# -- nonsense from a router --------------------------------------------------------------------------------------------


class MailWire(Wire):
    """A bare connection that keeps the files which come along with a frame."""

    files: tuple[int, ...] = ()

    def recv_into(self, buffer: memoryview) -> int:
        data, files, _, _ = socket.recv_fds(self.sock, len(buffer), 3)
        self.files += tuple(files)
        buffer[: len(data)] = data
        return len(data)

    def read(self) -> Frame:
        while not self._frames:
            self._frames = self.reader.receive(self)
        return self._frames.pop(0)


@contextmanager
def mail_to(server: ExpertServer) -> Iterator[tuple[MailWire, Mailbox, mmap.mmap]]:
    """A bare router's connection, its end of the mailbox, and the memory of that."""
    wire = MailWire(socket.socket(socket.AF_UNIX))
    wire.sock.connect(server.address[0])
    wire.join()
    mailbox = Mailbox.adopt(wire.files)
    assert mailbox is not None
    try:
        yield wire, mailbox, mmap.mmap(mailbox.files[0], 2 * AREA_BYTES)
    finally:
        wire.close()
        mailbox.close()


def request(
    counts: Sequence[int] = (1, 1, 0),
    *,
    kind: Kind = Kind.ROWS,
    layer: int = 0,
    rows: int = 2,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    digest8: bytes = DIGEST8,
    trace: bytes = b"",
) -> bytes:
    """Header, trace context and counts; the payload is whatever lies behind."""
    front = lead(kind, dtype, 0, digest8, TRACED if trace else 0)
    size = rows * hidden * dtype.itemsize
    header = WHOLE.pack(front, 7, layer, rows, hidden, 60_000, 0, 0, len(counts), size)
    return header + trace + np.array(counts, dtype=np.int64).tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense" * 20, "no frame of this cluster"),
        (bytes(200), "no frame of this cluster"),
        (request((1, 2, 0)), "counts that sum to 3 for 2 rows"),
        (request((3, -1, 0)), "the smallest -1"),
        (request((70_000, 0, 0), rows=70_000), "payload bytes in a mailbox"),
        (request((1 << 24, 0, 0), rows=1 << 24), "rows in one frame"),
        (request((1, 1)), "takes 3 counts"),
        (request(layer=9), "holds no experts in layer 9"),
        (request(hidden=HIDDEN + 1), "rows of 8"),
        (request(dtype=torch.float16), "torch.float32"),
        (request(digest8=bytes(8)), "model digest"),
        (request(trace=bytes(24)), "a trace context needs 24 bytes"),
        (request(trace=bytes(range(1, 17)) + bytes(8)), "a trace context needs 24 bytes"),
        (request((), kind=Kind.RESULT), "not expected here"),
        (request((), kind=Kind.REFERENCE), "not expected here"),
    ],
)
def test_nonsense_in_the_request_closes_its_connection_and_no_other(data: bytes, reason: str) -> None:
    with serving() as (server, replica), transport() as stream:
        answered(stream, replica, batch())
        with mail_to(server) as (wire, mailbox, memory):
            # A good request before: what is the same is looked at once, and this is not the same.
            memory[: len(request())] = request()
            mailbox.ring()
            until(lambda: server.stats().batches == 2)
            memory[: len(data)] = data
            mailbox.ring()
            (error,) = wire.read_to_end()
            assert (error.kind, error.status) == (Kind.ERROR, Status.CLOSING)
            assert reason in bytes(error.data).decode()
        until(lambda: server.stats().connections == 1)
        answered(stream, replica, batch())


def test_flipped_bytes_leave_the_server_and_other_routers_alone() -> None:
    chance = random.Random(5)
    with serving() as (server, replica), transport() as stream:
        for _ in range(60):
            data = bytearray(request())
            for _ in range(chance.randint(1, 3)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with mail_to(server) as (_, mailbox, memory):
                memory[: len(data)] = bytes(data)
                mailbox.ring()
        answered(stream, replica, batch())
        until(lambda: server.stats().connections == 1)
        assert server.alive


def test_a_second_request_before_the_answer_closes_the_connection() -> None:
    with serving(emulate_rows_per_s=1.0) as (server, _), mail_to(server) as (wire, mailbox, memory):
        memory[: len(request())] = request()
        mailbox.ring()
        until(lambda: server.stats().batches == 1)
        mailbox.ring()
        (error,) = wire.read_to_end()
        assert b"a second request in a mailbox" in error.data


# -- nonsense from a replica -------------------------------------------------------------------------------------------


def result(sequence: int = 1, rows: int = 3, dtype: torch.dtype = torch.float32, digest8: bytes = DIGEST8) -> bytes:
    return bytes(encode(Kind.RESULT, sequence, digest8=digest8, body=torch.ones(rows, HIDDEN, dtype=dtype))[0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense" * 20, "no frame of this cluster"),
        (result(sequence=2), "answers another batch"),
        (result(rows=2), "answers another batch"),
        (result(dtype=torch.float16), "answers another batch"),
        (result(digest8=bytes(8)), "model digest"),
        (request(rows=3), "not expected here"),
        (
            WHOLE.pack(lead(Kind.RESULT, torch.float32, 0, DIGEST8), 1, 0, 70_000, 8, 0, 0, 0, 0, 70_000 * 32),
            "mailbox of",
        ),
    ],
)
def test_nonsense_in_the_result_loses_the_replica(data: bytes, reason: str) -> None:
    mailbox = Mailbox.create()
    memory = mmap.mmap(mailbox.files[0], 2 * AREA_BYTES)
    with impostor(unheard, files=mailbox.files) as replica, transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        assert stream._links[replica.id].mailed is call
        memory[AREA_BYTES : AREA_BYTES + len(data)] = data
        mailbox.ring()
        finished(stream, [call])
        with pytest.raises(ReplicaLostError, match=reason):
            call.result()
    mailbox.close()


def test_a_bell_that_nobody_waits_for_is_heard_in_peace() -> None:
    mailbox = Mailbox.create()
    with impostor(unheard, files=mailbox.files) as replica, transport() as stream:
        call = stream.send(replica, batch((100, 100, 0), hidden=4096), WAIT_S)
        mailbox.ring()
        assert stream.wait([call], 0.01) == []
        assert stream._links[replica.id].mailed is None
    mailbox.close()


def area(size: int = 2 * AREA_BYTES, *, seal: bool = True) -> int:
    """A file that may be a mailbox's."""
    file = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    if seal:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [area(seal=False), bell(), bell()],
        lambda: [area(AREA_BYTES), bell(), bell()],
        lambda: [area(), bell()],
        lambda: [bell(), bell(), bell()],
        lambda: [area(), bell(), area()],
        lambda: [area(), os.open(os.devnull, os.O_RDWR), bell()],
        lambda: [area(), *os.pipe()],
    ],
    ids=["not sealed", "too small", "no second bell", "no memory", "a file as bell", "a device as bell", "pipes"],
)
def test_files_that_are_no_mailbox_are_not_adopted_and_closed(make: Callable[[], list[int]]) -> None:
    before = kept_files()
    assert Mailbox.adopt(make()) is None
    assert open_files() == before

"""How a mailbox begins and ends: without room for it, a replica that dies, a call that nobody wants. 1 s."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from array import array

import pytest
import torch

from cluster.errors import ReplicaLostError
from cluster.fabric import connections
from cluster.fabric.frames import Frame, Kind, encode
from cluster.fabric.mailbox import AREA_BYTES, SUPPORTED, Mailbox
from cluster.fabric.sockets import EDGE, Poller
from tests.cluster.fabric.serving import (
    DIGEST,
    HIDDEN,
    WAIT_S,
    Gate,
    Wire,
    answered,
    batch,
    finished,
    impostor,
    kept_files,
    serving,
    transport,
    until,
)

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="there is no mailbox on this system")
DIGEST8 = DIGEST[:8]
ROWS = 3


def refuse_bells(monkeypatch: pytest.MonkeyPatch, poller: Poller[object]) -> None:
    register = poller.register

    def only_sockets(sock: socket.socket | int, events: int, target: object) -> None:
        if events == EDGE:
            raise OSError(errno.ENOSPC, "no more can be watched")
        register(sock, events, target)

    monkeypatch.setattr(poller, "register", only_sockets)


# -- without room for it -----------------------------------------------------------------------------------------------


def test_a_mailbox_with_one_bell_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept_files()
    bells = [os.eventfd(0, os.EFD_CLOEXEC)]

    def one(*_: int) -> int:
        if not bells:
            raise OSError(errno.EMFILE, "too many open files")
        return bells.pop()

    monkeypatch.setattr(os, "eventfd", one)
    with pytest.raises(OSError, match="too many open files"):
        Mailbox.create()
    assert kept_files() == before


def test_files_that_cannot_be_sent_are_closed_and_the_router_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "array", lambda _code, _files: array("i", [-1]))
    with serving() as (server, replica):
        before = kept_files()
        with transport() as stream:
            assert answered(stream, replica, batch()).mailbox is None
        del stream
        until(lambda: server.stats().connections == 0)
        until(lambda: kept_files() == before)


def test_a_replica_that_cannot_watch_a_bell_serves_without(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (server, replica):
        refuse_bells(monkeypatch, server._connections._poller)  # type: ignore[arg-type]
        before = kept_files()
        for _ in range(2):
            with transport() as stream:
                assert answered(stream, replica, batch()).mailbox is None
            del stream
        until(lambda: server.stats().connections == 0)
        until(lambda: kept_files() == before)
        assert server.alive


def test_a_router_that_cannot_watch_a_bell_has_lost_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (server, replica), transport() as stream:
        before = kept_files()
        with monkeypatch.context() as patched:
            refuse_bells(patched, stream._poller)  # type: ignore[arg-type]
            with pytest.raises(ReplicaLostError, match="no more can be watched"):
                stream.send(replica, batch(), WAIT_S)
        until(lambda: server.stats().connections == 0)
        until(lambda: kept_files() == before)
        answered(stream, replica, batch())


# -- results that were there before the end ----------------------------------------------------------------------------


def put_result(memory: mmap.mmap, sequence: int, rows: int = ROWS) -> None:
    """What a replica writes, all ones."""
    header, payload = encode(Kind.RESULT, sequence, digest8=DIGEST8, body=torch.ones(rows, HIDDEN))
    memory[AREA_BYTES + 64 : AREA_BYTES + 64 + len(payload)] = bytes(payload)
    memory[AREA_BYTES : AREA_BYTES + len(header)] = bytes(header)


@pytest.mark.parametrize("nonsense", [b"", b"nonsense" * 20], ids=["end", "nonsense"])
@pytest.mark.parametrize("rung", [True, False])
def test_a_result_counts_though_the_end_is_seen_before_its_bell(rung: bool, nonsense: bytes) -> None:
    mailbox = Mailbox.create()
    memory = mmap.mmap(mailbox.files[0], 2 * AREA_BYTES)

    def answer(wire: Wire, _: Frame) -> None:
        # Asked by socket for a second batch: the end comes first, as the socket is registered before the bell.
        put_result(memory, 1)
        if nonsense:
            wire.send([nonsense])
        wire.sock.shutdown(socket.SHUT_RDWR)
        if rung:
            mailbox.ring()

    with impostor(answer, files=mailbox.files) as replica, transport() as stream:
        mailed = stream.send(replica, batch(), WAIT_S)
        by_socket = stream.send(replica, batch(), WAIT_S)
        link = stream._links[replica.id]
        assert (link.mailed, link.calls) == (mailed, {1: mailed, 2: by_socket})
        finished(stream, [mailed, by_socket])
        assert torch.equal(mailed.result(), torch.ones(ROWS, HIDDEN))
        with pytest.raises(ReplicaLostError):
            by_socket.result()
    mailbox.close()


@pytest.mark.parametrize(("sequence", "rows"), [(2, ROWS), (1, ROWS - 1), (0, ROWS)])
def test_what_answers_another_batch_is_no_result_at_the_end_either(sequence: int, rows: int) -> None:
    mailbox = Mailbox.create()
    put_result(mmap.mmap(mailbox.files[0], 2 * AREA_BYTES), sequence, rows)
    with (
        impostor(lambda wire, _: wire.sock.shutdown(socket.SHUT_RDWR), files=mailbox.files) as replica,
        transport() as stream,
    ):
        calls = [stream.send(replica, batch(), WAIT_S) for _ in range(2)]
        finished(stream, calls)
        for call in calls:
            with pytest.raises(ReplicaLostError, match="closed the connection"):
                call.result()
    mailbox.close()


def test_a_replica_that_answers_both_ways_does_not_write_over_the_result() -> None:
    mailbox = Mailbox.create()
    memory = mmap.mmap(mailbox.files[0], 2 * AREA_BYTES)
    rows, hidden = 8, 4096  # more than a reader stages
    wires: list[Wire] = []
    with (
        impostor(lambda wire, _: wires.append(wire), files=mailbox.files) as replica,
        transport() as stream,
    ):
        sent = batch((rows, 0, 0), hidden=hidden)
        sent.into = memoryview(bytearray(rows * hidden * 4))
        call = stream.send(replica, sent, WAIT_S)
        stream.send(replica, batch(), WAIT_S)  # by socket, to get at the other end of it
        until(lambda: bool(wires))
        data = b"".join(map(bytes, encode(Kind.RESULT, 1, digest8=DIGEST8, body=torch.full((rows, hidden), 9.0))))
        wires[0].send([data[:70_000]])
        while stream.bytes_received < 70_000:
            assert stream.wait([call], 0.01) == []
        header, payload = encode(Kind.RESULT, 1, digest8=DIGEST8, body=torch.ones(rows, hidden))
        memory[AREA_BYTES + 64 : AREA_BYTES + 64 + len(payload)] = bytes(payload)
        memory[AREA_BYTES : AREA_BYTES + len(header)] = bytes(header)
        mailbox.ring()
        finished(stream, [call])
        assert sent.placed
        wires[0].send([data[70_000:]])
        until(lambda: not stream.wait([], 0.01) and not stream._links)
        assert torch.equal(call.result(), torch.ones(rows, hidden))
    mailbox.close()


# -- waiting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", [False, True])
def test_nobody_looks_again_and_again_for_a_forgotten_call(forgotten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with serving(gate) as (_, replica), transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        link = stream._links[replica.id]
        if forgotten:
            stream.forget(call)
        poll = stream._poller.poll
        looks: list[float] = []
        monkeypatch.setattr(stream._poller, "poll", lambda timeout_s: looks.append(timeout_s) or poll(timeout_s))
        assert stream.wait([], 0.001) == []
        assert link.mailed is call
        assert (looks[0] == 0.0) is not forgotten
        monkeypatch.undo()
        gate.open.set()

"""The stream transport against real servers in this process and impostors. 5 s."""

from __future__ import annotations

import socket
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cluster.errors import FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.frames import Frame, Kind, Limits, encode
from cluster.fabric.links import StreamCall
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import Batch
from cluster.membership import Address, Replica
from tests.cluster.fabric.serving import (
    DIGEST,
    HIDDEN,
    NODE,
    WAIT_S,
    Gate,
    Wire,
    batch,
    expected,
    finished,
    impostor,
    replica_at,
    serving,
    socket_folder,
    transport,
    until,
)

DIGEST8 = DIGEST[:8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("node", [NODE, "another-node"])
def test_rows_go_and_results_come_bit_for_bit(dtype: torch.dtype, node: str) -> None:
    with serving(dtype=dtype, tcp=True) as (_, replica), transport(node_id=node) as stream:
        for counts in ((2, 0, 1), (0, 0, 1), (40, 50, 60)):
            sent = batch(counts, dtype=dtype)
            call = stream.send(replica, sent, WAIT_S)
            assert finished(stream, [call]) == [call]
            assert torch.equal(call.result(), expected(sent))
            assert call.result().dtype == dtype


def test_the_unix_socket_is_used_on_the_same_node_only() -> None:
    with serving(tcp=True) as (_, replica):
        for node, address in (
            (NODE, replace(replica.address, port=1)),
            ("other", replace(replica.address, unix_path="")),
        ):
            with transport(node_id=node) as stream:
                call = stream.send(replace(replica, address=address), batch(), WAIT_S)
                finished(stream, [call])
                assert call.error is None


def test_results_are_returned_in_order_of_arrival() -> None:
    gate = Gate()
    with serving(gate, replica_id="slow") as (_, slow), serving(replica_id="fast") as (_, fast), transport() as stream:
        first, second = stream.send(slow, batch(), WAIT_S), stream.send(fast, batch(), WAIT_S)
        assert stream.wait([first, second], WAIT_S) == [second]
        assert stream.wait([first], 0.0) == []
        assert not first.done
        with pytest.raises(FabricError, match="no result yet"):
            first.result()
        gate.open.set()
        assert stream.wait([first], WAIT_S) == [first]
        assert stream.wait([first, second], WAIT_S) == [second, first]


def test_large_batches_both_ways_do_not_block_each_other() -> None:
    with serving(hidden=4096) as (_, replica), transport() as stream:
        sent = [batch((200, 56, 0), layer=layer, hidden=4096) for layer in (0, 1, 0, 1)]
        calls = [stream.send(replica, part, WAIT_S) for part in sent]
        finished(stream, calls)
        for call, part in zip(calls, sent, strict=True):
            assert torch.equal(call.result(), expected(part))


def test_a_killed_replica_ends_its_calls_and_a_new_one_at_its_place_is_reached() -> None:
    gate = Gate()
    with transport() as stream:
        with serving(gate) as (server, replica):
            call = stream.send(replica, batch(), WAIT_S)
            assert gate.entered.wait(WAIT_S)
            # The server's thread is inside the experts: shut its end of the connection from here, as a kill would.
            for connection in list(server._connections.routers):
                connection.sock.shutdown(socket.SHUT_RDWR)
            assert stream.wait([call], WAIT_S) == [call]
            with pytest.raises(ReplicaLostError, match="replica-0 is lost"):
                call.result()
            gate.open.set()
        with pytest.raises(ReplicaLostError, match="cannot be reached"):
            stream.send(replica, batch(), WAIT_S)
        with serving() as (_, again):
            call = stream.send(again, batch(), WAIT_S)
            finished(stream, [call])
            assert call.error is None


def test_a_draining_replica_finishes_its_calls_and_takes_no_new_ones() -> None:
    gate = Gate()
    with serving(gate) as (server, replica), transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        assert gate.entered.wait(WAIT_S)
        assert not server.drain(0.0)
        gate.open.set()
        finished(stream, [call])
        assert call.error is None
        assert server.drain(WAIT_S)
        assert stream.wait([], 0.0) == []
        with pytest.raises(ReplicaLostError, match="draining"):
            stream.send(replica, batch(), WAIT_S)


def test_a_router_that_joins_during_the_drain_sends_elsewhere() -> None:
    for node in (NODE, "another-node"):
        with serving(tcp=True) as (server, replica), transport(node_id=node) as stream:
            # As for a router that was half-way through its handshake when the drain began.
            server._connections.draining = True
            with pytest.raises(ReplicaLostError, match="is draining"):
                stream.send(replica, batch(), WAIT_S)
            assert stream._links[replica.id].leaving


def test_a_forgotten_result_is_dropped() -> None:
    gate = Gate()
    with serving(gate) as (_, replica), transport() as stream:
        forgotten = stream.send(replica, batch(), WAIT_S)
        stream.forget(forgotten)
        stream.forget(forgotten)
        wanted = stream.send(replica, batch(), WAIT_S)
        gate.open.set()
        assert finished(stream, [wanted]) == [wanted]
        assert wanted.error is None


LARGE = (100, 100, 0)
WIDE = 4096
"""Together more than a reader stages and than a mailbox holds."""


def placed(fill: float = 0.0) -> tuple[Batch, memoryview]:
    """A large batch, and where its result is to go."""
    sent = batch(LARGE, hidden=WIDE)
    sent.into = memoryview(bytearray(torch.full((sum(LARGE), WIDE), fill).numpy().tobytes()))
    return sent, sent.into


@pytest.mark.parametrize("node", [NODE, "another-node"])
def test_a_large_result_is_received_where_it_belongs(node: str) -> None:
    with serving(hidden=WIDE, tcp=True) as (_, replica), transport(node_id=node) as stream:
        for _ in range(2):
            sent, into = placed()
            call = stream.send(replica, sent, WAIT_S)
            finished(stream, [call])
            assert sent.placed
            assert bytes(into) == expected(sent).numpy().tobytes()
            assert torch.equal(call.result(), expected(sent))


def test_what_is_missing_of_a_forgotten_result_goes_where_it_harms_nobody() -> None:
    rest = threading.Event()
    late = torch.ones(sum(LARGE), WIDE)

    def answer(wire: Wire, frame: Frame) -> None:
        assert frame.tensor is not None
        if rest.is_set():
            wire.send(encode(Kind.RESULT, frame.sequence, digest8=DIGEST8, body=frame.tensor * 2))
            return
        data = b"".join(map(bytes, encode(Kind.RESULT, frame.sequence, digest8=DIGEST8, body=late)))
        wire.send([data[: len(data) // 2]])
        assert rest.wait(WAIT_S)
        wire.send([data[len(data) // 2 :]])

    with impostor(answer) as replica, transport() as stream:
        sent, into = placed(fill=7.0)
        call = stream.send(replica, sent, WAIT_S)
        while stream.bytes_received < len(into) // 2:
            assert stream.wait([call], 0.01) == []
        stream.forget(call)
        before = bytes(into)
        half = np.frombuffer(before, dtype=np.float32)
        assert (half[0], half[-1]) == (1.0, 7.0)
        rest.set()
        again, _ = placed()
        later = stream.send(replica, again, WAIT_S)
        finished(stream, [later])
        assert bytes(into) == before
        assert not sent.placed
        assert torch.equal(later.result(), again.hidden[again.index] * 2)


def test_a_link_goes_with_its_connection() -> None:
    with serving() as (_, replica), transport() as stream:
        finished(stream, [stream.send(replica, batch(), WAIT_S)])
        reader = weakref.ref(stream._links[replica.id].reader)
        stream.close()
        # Without a collection: nothing refers to it in a circle.
        assert reader() is None


def test_replicas_that_are_not_retained_lose_their_connection_and_calls() -> None:
    gate = Gate()
    with serving(gate, replica_id="a") as (server, a), serving(replica_id="b") as (_, b), transport() as stream:
        lost, kept = stream.send(a, batch(), WAIT_S), stream.send(b, batch(), WAIT_S)
        stream.retain({"b"})
        assert isinstance(lost.error, ReplicaLostError)
        finished(stream, [kept])
        assert kept.error is None
        gate.open.set()
        until(lambda: server.stats().connections == 0)


@pytest.mark.parametrize(
    ("options", "replica_id", "reason"),
    [
        ({"key": b"another key"}, "replica-0", "wrong cluster key"),
        ({"digest": bytes(32)}, "replica-0", "wrong model digest"),
        ({}, "replica-1", "wrong replica"),
    ],
)
def test_a_mismatch_is_a_handshake_error_with_the_replicas_reason(
    options: dict[str, bytes], replica_id: str, reason: str
) -> None:
    with serving() as (_, replica), transport(**options) as stream, pytest.raises(HandshakeError, match=reason):
        stream.send(replace(replica, id=replica_id), batch(), WAIT_S)


def test_a_replica_of_another_wire_version_is_a_handshake_error() -> None:
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener, transport() as stream:
        listener.bind(str(folder / "s"))
        listener.listen()
        listener.settimeout(WAIT_S)

        def answer() -> None:
            sock, _ = listener.accept()
            sock.recv(4096)
            sock.sendall(b"EXSF\1" + bytes(53 + 32))  # as long as a CHALLENGE of version 1
            with suppress(OSError):
                sock.recv(1)
            sock.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HandshakeError, match="wire version 1; this side speaks 2"):
            stream.send(replica_at(Address(NODE, str(folder / "s"), "", 0)), batch(), WAIT_S)
        thread.join()


def test_a_replica_that_never_answers_is_given_up_in_time() -> None:
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        with transport(connect_timeout_s=0.05) as stream:
            start = time.monotonic()
            with pytest.raises(ReplicaLostError, match="did not finish the handshake"):
                stream.send(replica_at(Address(NODE, str(folder / "s"), "", 0)), batch(), WAIT_S)
            assert time.monotonic() - start < 5


def test_a_replica_that_is_on_another_node_without_a_port_is_lost() -> None:
    with transport() as stream, pytest.raises(ReplicaLostError, match="not reachable from this node"):
        stream.send(replica_at(Address("node-b", "/s", "", 0)), batch(), WAIT_S)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (encode(Kind.RESULT, 1, digest8=DIGEST8, body=torch.ones(2, HIDDEN)), "answers no call"),
        (encode(Kind.RESULT, 9, digest8=DIGEST8, body=torch.ones(3, HIDDEN)), "answers no call"),
        (encode(Kind.RESULT, 1, digest8=DIGEST8, body=torch.ones(3, HIDDEN).bfloat16()), "answers no call"),
        (encode(Kind.PONG, 1, digest8=DIGEST8), "answers no call"),
        (encode(Kind.ERROR, 0, digest8=DIGEST8, status=4, body=b"bad manners"), "bad manners"),
        ([b"nonsense" * 20], "no frame"),
        (encode(Kind.GOAWAY, digest8=bytes(8)), "model digest"),
    ],
)
def test_a_replica_that_answers_nonsense_is_lost(reply: list[bytes], reason: str) -> None:
    with impostor(lambda wire, _: wire.send(reply)) as replica, transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        finished(stream, [call])
        with pytest.raises(ReplicaLostError, match=reason):
            call.result()


def test_a_result_before_the_nonsense_still_counts() -> None:
    result = encode(Kind.RESULT, 1, digest8=DIGEST8, body=torch.ones(3, HIDDEN))
    reply = [*result, *encode(Kind.ERROR, digest8=DIGEST8, status=4)]
    with impostor(lambda wire, _: wire.send(reply)) as replica, transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        finished(stream, [call])
        assert call.error is None


def test_a_batch_beyond_the_limits_is_refused_before_it_is_sent() -> None:
    with serving() as (_, replica), transport(limits=Limits(payload_bytes=64)) as stream:
        with pytest.raises(FabricError, match="more than one frame may hold"):
            stream.send(replica, batch((3, 0, 0)), WAIT_S)
        assert stream.bytes_sent == 0


def test_a_replica_that_takes_no_rows_is_lost_before_they_fill_the_memory() -> None:
    gate = Gate()
    large = batch((1000, 0, 0), hidden=4096)
    with serving(gate, hidden=4096) as (_, replica), transport(unsent_bytes=32 << 20) as stream:
        first = stream.send(replica, large, WAIT_S)
        assert stream.wait([first], 0.0) == []
        while stream._links[replica.id].writer.pending_bytes <= 32 << 20:
            stream.send(replica, large, WAIT_S)
        with pytest.raises(ReplicaLostError, match="takes no more rows"):
            stream.send(replica, large, WAIT_S)
        assert isinstance(first.error, ReplicaLostError)
        gate.open.set()


def test_bytes_are_counted_across_connections() -> None:
    with transport() as stream:
        for _ in range(2):
            with serving() as (_, replica):
                before = stream.bytes_sent, stream.bytes_received
                finished(stream, [stream.send(replica, batch((16, 16, 16)), WAIT_S)])
                rows_bytes = 48 * HIDDEN * 4
                assert rows_bytes < stream.bytes_sent - before[0] < rows_bytes + 500
                assert rows_bytes < stream.bytes_received - before[1] < rows_bytes + 500
                stream.retain(())
        stream.close()
        stream.close()


def send_reference(stream: StreamTransport, replica: Replica) -> StreamCall:
    return stream.send_reference(
        replica,
        layer=0,
        counts=np.array([2, 0, 1]),
        rows=3,
        hidden=HIDDEN,
        dtype=torch.float32,
        payload=b"ask",
        deadline_s=WAIT_S,
    )


def answer_reference(heard: list[Frame], wire: Wire, frame: Frame) -> None:
    heard.append(frame)
    if frame.kind is Kind.REFERENCE:
        shape = {"rows": frame.rows, "hidden": frame.hidden, "dtype": frame.dtype}
        wire.send(encode(frame.kind, frame.sequence, digest8=DIGEST8, body=b"answer to " + frame.data, **shape))


def test_a_reference_is_answered_and_released() -> None:
    heard: list[Frame] = []
    with impostor(partial(answer_reference, heard)) as replica, transport() as stream:
        call = send_reference(stream, replica)
        finished(stream, [call])
        assert call.payload() == b"answer to ask"
        with pytest.raises(FabricError, match="a reference instead of rows"):
            call.result()
        stream.release(call)
        until(lambda: len(heard) == 2)
        assert (heard[1].kind, heard[1].sequence) == (Kind.RELEASE, call.sequence)


def test_a_forgotten_reference_is_released_when_it_arrives() -> None:
    heard: list[Frame] = []
    with impostor(partial(answer_reference, heard)) as replica, transport() as stream:
        forgotten = send_reference(stream, replica)
        stream.forget(forgotten)
        later = send_reference(stream, replica)
        finished(stream, [later])
        until(lambda: [frame.sequence for frame in heard if frame.kind is Kind.RELEASE] == [forgotten.sequence])
    stream.release(later)

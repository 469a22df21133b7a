"""An expert server against routers, strangers and nonsense, over real sockets in this process. 8 s."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import ConfigError, FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.connections import ServerLimits
from cluster.fabric.frames import HEADER_BYTES, MAGIC, Frame, Kind, Limits, Status, encode
from cluster.fabric.server import ExpertServer, ServedGroup
from tests.cluster.fabric.serving import (
    DIGEST,
    HIDDEN,
    KEY,
    WAIT_S,
    Gate,
    Wire,
    batch,
    expected,
    finished,
    impostor,
    serving,
    socket_folder,
    times_expert,
    transport,
    until,
    wired,
)

DIGEST8 = DIGEST[:8]


def rows_frame(
    sequence: int,
    rows: Tensor,
    *,
    counts: tuple[int, ...] | None = None,
    layer: int = 0,
    deadline_ms: int = 60_000,
) -> bytes:
    counts = counts or (len(rows), 0, 0)
    buffers = encode(
        Kind.ROWS,
        sequence,
        digest8=DIGEST8,
        layer=layer,
        deadline_ms=deadline_ms,
        counts=np.array(counts),
        body=rows,
    )
    return b"".join(bytes(buffer) for buffer in buffers)


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_another_wire_version_is_refused_with_its_number() -> None:
    with serving() as (server, _), wired(server) as wire:
        wire.send([MAGIC + b"\1" + bytes(HEADER_BYTES - 5)])
        (refused,) = wire.read_to_end()
    assert refused.kind is Kind.REFUSED
    assert b"wire version 1; this side speaks 2" in refused.data


def test_a_stranger_with_another_key_is_refused_and_closed() -> None:
    with serving() as (server, _), wired(server) as wire:
        with pytest.raises(HandshakeError, match="wrong cluster key"):
            wire.join(b"another key")
        assert wire.read_to_end() == []
        assert server.stats().connections == 0


def test_a_stranger_may_not_send_rows_or_large_frames() -> None:
    with serving() as (server, _):
        for data in (rows_frame(1, torch.ones(1, HIDDEN)), b"".join(map(bytes, encode(Kind.HELLO, body=bytes(1025))))):
            with wired(server) as wire:
                wire.send([data])
                assert [frame.kind for frame in wire.read_to_end()] == [Kind.REFUSED]


def test_a_stranger_that_says_nothing_is_closed() -> None:
    with serving(limits=ServerLimits(handshake_s=0.05)) as (server, _), wired(server) as wire:
        (refused,) = wire.read_to_end()
        assert b"longer than 0.05 s" in refused.data


def test_strangers_are_bounded_and_the_oldest_makes_room() -> None:
    with serving(limits=ServerLimits(strangers=2)) as (server, _):
        wires = [Wire.to(server.address[0]) for _ in range(3)]
        (refused,) = wires[0].read_to_end()
        assert b"too many connections" in refused.data
        wires[2].join()
        assert server.stats().connections == 1
        for wire in wires:
            wire.close()


# -- nonsense ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy_server() -> Iterator[tuple[ExpertServer, Wire]]:
    """A server with small limits, and a healthy connection to it."""
    frame = Limits(rows=64, payload_bytes=4096, control_bytes=256, counts=16)
    with serving(limits=ServerLimits(frame=frame)) as (server, _), wired(server) as wire:
        yield server, wire.join()


def check_healthy(healthy: Wire) -> None:
    healthy.send([rows_frame(5, torch.ones(2, HIDDEN), counts=(1, 0, 1))])
    answer = healthy.read()
    assert answer.tensor is not None
    assert answer.tensor[:, 0].tolist() == [1.0, 3.0]


VALID = rows_frame(1, torch.ones(2, HIDDEN), counts=(1, 1, 0))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    known=st.booleans(),
    data=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda tail: MAGIC + b"\1" + tail),
        st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3).map(
            lambda changes: bytes(dict(changes).get(i, byte) for i, byte in enumerate(VALID))
        ),
    ),
)
def test_nonsense_closes_its_connection_and_no_other(
    busy_server: tuple[ExpertServer, Wire], known: bool, data: bytes
) -> None:
    server, healthy = busy_server
    with wired(server) as wire:
        if known:
            wire.join()
        wire.send([data])
        wire.sock.shutdown(socket.SHUT_WR)
        # Either a reply (the bytes happened to be valid) or a stated reason or nothing; then the end.
        for frame in wire.read_to_end():
            assert frame.kind in (Kind.RESULT, Kind.ERROR, Kind.REFUSED, Kind.CHALLENGE, Kind.PONG)
    check_healthy(healthy)
    until(lambda: server.stats().connections == 1)
    assert server.alive


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (rows_frame(1, torch.ones(1, HIDDEN), layer=9), "holds no experts in layer 9"),
        (rows_frame(1, torch.ones(1, HIDDEN), counts=(1, 0)), "takes 3 counts"),
        (rows_frame(1, torch.ones(1, HIDDEN + 1)), "rows of 8"),
        (rows_frame(1, torch.ones(1, HIDDEN, dtype=torch.bfloat16)), "torch.float32"),
        (b"".join(map(bytes, encode(Kind.GOAWAY, digest8=DIGEST8))), "GOAWAY frame is not expected"),
        (b"".join(map(bytes, encode(Kind.PING, digest8=bytes(8)))), "model digest"),
    ],
)
def test_frames_that_do_not_fit_the_group_close_the_connection_with_the_reason(data: bytes, reason: str) -> None:
    with serving() as (server, _), wired(server) as wire:
        wire.join().send([data])
        (error,) = wire.read_to_end()
    assert (error.kind, error.status) == (Kind.ERROR, Status.CLOSING)
    assert reason in bytes(error.data).decode()


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_of_two_routers_for_one_layer_are_computed_together() -> None:
    gate = Gate()
    gate.open.set()
    with serving(gate) as (server, replica), transport() as one, transport() as two:
        for stream in (one, two):
            finished(stream, [stream.send(replica, batch((1, 0, 0)), WAIT_S)])
        gate.shut()
        blocker = one.send(replica, batch(layer=0), WAIT_S)
        assert gate.entered.wait(WAIT_S)
        sent = [batch((1, 0, 2), layer=1), batch((0, 2, 2), layer=1)]
        calls = [stream.send(replica, part, WAIT_S) for stream, part in zip((one, two), sent, strict=True)]
        gate.open.set()
        finished(one, [blocker, calls[0]])
        finished(two, [calls[1]])
        for call, part in zip(calls, sent, strict=True):
            assert torch.equal(call.result(), expected(part))
        stats = server.stats()
    assert gate.batches == [(0, [2, 0, 1]), (1, [1, 2, 4])]
    assert (stats.rows, stats.batches, stats.frames, stats.queue_rows) == (12, 4, 5, 0)


def test_replies_tell_the_queue_and_the_time_of_the_batch() -> None:
    # In one piece, so that the second waits while the first is computed, however busy this machine is.
    frames = [rows_frame(1, torch.randn(3, HIDDEN), layer=0), rows_frame(2, torch.randn(1, HIDDEN), layer=1)]
    with serving(emulate_rows_per_s=15.0) as (server, _), wired(server) as wire:
        wire.join().send(frames)
        first, second = wire.read(), wire.read()
        assert [(each.sequence, each.queue_rows) for each in (first, second)] == [(1, 1), (2, 0)]
        assert first.compute_us == pytest.approx(200_000)


def test_experts_that_raise_fail_their_batch_and_the_server_goes_on() -> None:
    def compute(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        if layer == 1:
            raise RuntimeError("out of luck")
        return times_expert(layer, counts, rows)

    with serving(compute) as (_, replica), transport() as stream:
        bad, good = (stream.send(replica, batch(layer=layer), WAIT_S) for layer in (1, 0))
        finished(stream, [bad, good])
        with pytest.raises(FabricError, match="replica-0: RuntimeError: out of luck"):
            bad.result()
        assert not isinstance(bad.error, ReplicaLostError)
        assert good.error is None


def test_rows_that_waited_past_their_deadline_are_not_computed() -> None:
    # Both in one piece on one connection: neither can overtake the other, and the second waits while the device is
    # busy for 50 ms with the first, however busy this machine is.
    first = rows_frame(1, torch.randn(5, HIDDEN), layer=0)
    late = rows_frame(2, torch.randn(1, HIDDEN), layer=1, deadline_ms=1)
    with serving(emulate_rows_per_s=100.0) as (server, _), wired(server) as wire:
        wire.join().send([first, late])
        answers = {frame.sequence: frame for frame in (wire.read(), wire.read())}
        assert answers[1].kind is Kind.RESULT
        assert (answers[2].kind, answers[2].status) == (Kind.ERROR, Status.LATE)
        assert server.stats().batches == 1


def test_rows_that_a_replica_calls_late_may_be_sent_to_another_one() -> None:
    def too_late(wire: Wire, frame: Frame) -> None:
        body = b"the deadline passed in the queue."
        wire.send(encode(Kind.ERROR, frame.sequence, digest8=DIGEST8, status=Status.LATE, body=body))

    with impostor(too_late) as replica, transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        finished(stream, [call])
        with pytest.raises(ReplicaLostError, match="deadline"):
            call.result()


def test_a_computation_that_does_not_end_shows_while_it_lasts() -> None:
    gate = Gate()
    with serving(gate) as (server, replica), transport() as stream:
        assert server.stuck_s() == 0.0
        call = stream.send(replica, batch(), WAIT_S)
        assert gate.entered.wait(WAIT_S)
        until(lambda: server.stuck_s() > 0.01)
        gate.open.set()
        finished(stream, [call])
        assert server.stuck_s() == 0.0


def test_experts_that_raise_are_not_stuck_afterwards() -> None:
    def compute(*_: object) -> Tensor:
        raise RuntimeError("out of luck")

    with serving(compute) as (server, replica), transport() as stream:
        finished(stream, [stream.send(replica, batch(), WAIT_S)])
        assert server.stuck_s() == 0.0


def test_ping_is_answered() -> None:
    with serving() as (server, _), wired(server) as wire:
        wire.join().send(encode(Kind.PING, 42, digest8=DIGEST8))
        pong = wire.read()
        assert (pong.kind, pong.sequence) == (Kind.PONG, 42)


def test_an_emulated_device_takes_its_time() -> None:
    with serving(emulate_rows_per_s=100.0) as (server, replica), transport() as stream:
        start = time.monotonic()
        calls = [stream.send(replica, batch((3, 0, 0), layer=layer), WAIT_S) for layer in (0, 1)]
        finished(stream, calls)
        assert time.monotonic() - start >= 0.06
        assert [call.compute_s for call in calls] == [pytest.approx(0.03)] * 2
        assert server.stats().busy_s == pytest.approx(0.06)


def test_a_router_that_does_not_read_is_closed_and_others_are_served() -> None:
    with serving(hidden=4096, limits=ServerLimits(out_bytes=1 << 20)) as (server, replica), wired(server) as wire:
        wire.join()
        data = rows_frame(1, torch.ones(16, 4096), counts=(16, 0, 0))
        with pytest.raises(OSError, match=r"reset|pipe"):
            wire.send([data] * 100)
        with transport() as stream:
            call = stream.send(replica, batch(hidden=4096), WAIT_S)
            finished(stream, [call])
            assert call.error is None


@pytest.mark.parametrize("stall", ["writes half a frame", "reads nothing"])
def test_a_router_that_stops_half_way_is_closed(stall: str) -> None:
    with serving(hidden=4096, limits=ServerLimits(stall_s=0.05)) as (server, _), wired(server) as wire:
        wire.join()
        data = rows_frame(1, torch.ones(64, 4096), counts=(64, 0, 0))
        with suppress(OSError):
            wire.send([data[:1000]] if stall == "writes half a frame" else [data] * 16)
        until(lambda: server.stats().connections == 0)


def test_a_router_with_too_many_waiting_rows_is_not_read_from_until_they_are_computed() -> None:
    gate = Gate()
    limits = ServerLimits(waiting_bytes=1)
    with serving(gate, limits=limits) as (server, replica), transport() as stream:
        calls = [stream.send(replica, batch(layer=0), WAIT_S)]
        assert gate.entered.wait(WAIT_S)
        calls += [stream.send(replica, batch(layer=layer), WAIT_S) for layer in (1, 0, 1)]
        gate.open.set()
        finished(stream, calls)
        assert all(call.error is None for call in calls)
        assert server.stats().rows == 12


# -- references --------------------------------------------------------------------------------------------------------


@dataclass
class Codec:
    """Keeps rows in a dictionary; a payload is its key."""

    rows: dict[bytes, Tensor] = field(default_factory=dict)
    released: list[object] = field(default_factory=list)

    def load(self, payload: bytes, counts: Tensor) -> Tensor:  # noqa: ARG002
        if payload not in self.rows:
            raise ReplicaLostError("the owner is gone.")
        return self.rows[payload]

    def store(self, rows: Tensor) -> tuple[object, bytes]:
        key = b"result-%d" % len(self.rows)
        self.rows[key] = rows
        return key, key

    def release(self, token: object) -> None:
        self.released.append(token)


def reference(sequence: int, payload: bytes) -> list[bytes | memoryview]:
    return encode(
        Kind.REFERENCE,
        sequence,
        digest8=DIGEST8,
        rows=2,
        hidden=HIDDEN,
        dtype=torch.float32,
        deadline_ms=60_000,
        counts=np.array([1, 0, 1]),
        body=payload,
    )


def test_a_reference_is_answered_with_a_reference_that_is_held_until_released() -> None:
    codec = Codec({b"rows": torch.ones(2, HIDDEN)})
    with serving(references=codec) as (server, _), wired(server) as wire:
        wire.join().send(reference(7, b"rows"))
        answer = wire.read()
        assert (answer.kind, answer.sequence, answer.rows, answer.hidden) == (Kind.REFERENCE, 7, 2, HIDDEN)
        assert codec.rows[bytes(answer.data)][:, 0].tolist() == [1.0, 3.0]
        assert (server.stats().references, codec.released) == (1, [])
        wire.send(encode(Kind.RELEASE, 7, digest8=DIGEST8))
        wire.send(encode(Kind.RELEASE, 7, digest8=DIGEST8))
        until(lambda: server.stats().references == 0)
        assert codec.released == [bytes(answer.data)]


def test_results_are_released_when_their_router_is_gone() -> None:
    codec = Codec({b"rows": torch.ones(2, HIDDEN)})
    with serving(references=codec) as (server, _):
        with wired(server) as wire:
            wire.join().send(reference(1, b"rows"))
            wire.send(reference(2, b"rows"))
            wire.read()
            wire.read()
        until(lambda: server.stats().connections == 0)
        assert sorted(map(str, codec.released)) == ["b'result-1'", "b'result-2'"]


def test_a_router_may_hold_only_so_many_results(caplog: pytest.LogCaptureFixture) -> None:
    codec = Codec({b"rows": torch.ones(2, HIDDEN)})
    told: list[Status] = []
    options = {
        "limits": ServerLimits(references=1),
        "on_done": lambda jobs, _: told.extend(job.status for job in jobs),
    }
    with serving(references=codec, **options) as (server, _), wired(server) as wire:
        wire.join()
        for sequence in (1, 2):
            wire.send(reference(sequence, b"rows"))
            answer = wire.read()
        assert (answer.kind, answer.status) == (Kind.ERROR, Status.FAILED)
        until(lambda: len(told) == 2)
        assert told == [Status.OK, Status.FAILED]
        assert "a result of layer 0 could not be stored: " in caplog.text
        assert len(codec.released) + server.stats().references == len(codec.rows) - 1


def test_a_reference_that_cannot_be_loaded_is_lost() -> None:
    with serving(references=Codec()) as (server, _), wired(server) as wire:
        wire.join().send(reference(1, b"nothing"))
        answer = wire.read()
        assert (answer.kind, answer.status) == (Kind.ERROR, Status.LOST)
        assert b"the owner is gone" in answer.data


# -- beginning and end -------------------------------------------------------------------------------------------------


def test_drain_finishes_what_is_here_and_takes_no_new_connection() -> None:
    gate = Gate()
    with serving(gate) as (server, replica), transport() as stream:
        call = stream.send(replica, batch(), WAIT_S)
        assert gate.entered.wait(WAIT_S)
        results: list[bool] = []
        drainer = threading.Thread(target=lambda: results.append(server.drain(WAIT_S)))
        drainer.start()
        gate.open.set()
        drainer.join(WAIT_S)
        assert results == [True]
        finished(stream, [call])
        assert call.error is None
        with pytest.raises(OSError, match=r"refused|No such file"):
            Wire.to(server.address[0])
        server.close()
        assert server.drain(WAIT_S)


def test_drain_gives_up_in_time() -> None:
    codec = Codec({b"rows": torch.ones(2, HIDDEN)})
    with serving(references=codec) as (server, _), wired(server) as wire:
        wire.join().send(reference(1, b"rows"))
        wire.read()
        assert not server.drain(0.02)
        assert wire.read().kind is Kind.GOAWAY
        wire.send(encode(Kind.RELEASE, 1, digest8=DIGEST8))
        assert server.drain(WAIT_S)


def test_close_is_idempotent_and_leaves_no_socket_behind() -> None:
    with serving(tcp=True) as (server, _):
        path, host, port = server.address
        assert os.path.exists(path)
        server.close()
        server.close()
        assert not server.alive
        assert not os.path.exists(path)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port))


def unstarted(path: Path | None = None, host: str | None = None) -> ExpertServer:
    shape = ServedGroup("experts-0", "replica-0", torch.float32, {0: 1}, {0: 1})
    return ExpertServer(
        times_expert, shape=shape, digest=DIGEST, key=KEY, unix_path=None if path is None else str(path), host=host
    )


def test_a_server_that_cannot_listen_says_why() -> None:
    with socket_folder() as folder:
        (folder / "open").mkdir(mode=0o755)
        cases = {
            unstarted(folder / ("x" * 100)): "longer than 100 bytes",
            unstarted(folder / "open" / "s"): "mode 0755; it must be 0700",
            unstarted(folder / "none" / "s"): "cannot be opened: No such file",
            unstarted(host="no.such.host.invalid"): "cannot be listened on",
            unstarted(): "needs a Unix socket path or a host",
        }
        for server, reason in cases.items():
            with pytest.raises(ConfigError, match=reason):
                server.start()
            server.close()

"""What strangers cost an expert server: those who hammer, those who come when files run out, any bytes (about 6 s)."""

from __future__ import annotations

import errno
import os
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import FrameError, HandshakeError
from cluster.fabric import connections
from cluster.fabric.connections import ServerLimits
from cluster.fabric.frame_io import FrameReader
from cluster.fabric.frames import HANDSHAKE_LIMITS, HEADER_BYTES, MAGIC, Kind, Limits, encode
from cluster.fabric.handshake import NONCE_BYTES, Identity, ReplicaHandshake, RouterHandshake
from cluster.fabric.server import ExpertServer
from cluster.fabric.strangers import ADDRESSES, FREE, Strangers
from cluster.membership import Address, Replica
from tests.cluster.fabric.serving import (
    DIGEST,
    KEY,
    WAIT_S,
    answered,
    batch,
    open_files,
    replica_at,
    serving,
    transport,
    until,
    wired,
)

LOUD, QUIET = "10.0.0.1", "10.0.0.2"


def hammered(strangers: Strangers, address: str, times: int, now: float = 0.0) -> int:
    """How many of so many connections that come to nothing were let in."""
    admitted = 0
    for _ in range(times):
        if strangers.admits(address, now):
            admitted += 1
            strangers.troubled(address, now)
    return admitted


def test_who_makes_trouble_is_turned_away_and_nobody_else() -> None:
    strangers = Strangers()
    assert hammered(strangers, LOUD, 1000) == FREE
    assert strangers.admits(QUIET, 0.0)
    assert hammered(strangers, LOUD, 1000, now=10.0) == 10
    assert hammered(strangers, LOUD, 1000, now=1e4) == FREE


def test_an_address_that_has_proved_the_key_is_never_turned_away() -> None:
    strangers = Strangers()
    hammered(strangers, LOUD, 1000)
    strangers.proved(LOUD)
    assert hammered(strangers, LOUD, 1000) == 1000


def test_unix_sockets_are_never_turned_away() -> None:
    assert hammered(Strangers(), "", 1000) == 1000


def test_no_more_addresses_are_remembered_than_a_server_can_afford() -> None:
    strangers = Strangers()
    for number in range(3 * ADDRESSES):
        hammered(strangers, str(number), 2)
        strangers.proved(f"router-{number}")
    assert len(strangers._left) == len(strangers._proved) == ADDRESSES


# -- a server ----------------------------------------------------------------------------------------------------------


def knock(server: ExpertServer, source: str = "127.0.0.2") -> bool:
    """Say nonsense by TCP; whether the server listened, so that it gives a reason."""
    _, host, port = server.address
    with socket.create_connection((host, port), WAIT_S, source_address=(source, 0)) as sock, suppress(OSError):
        sock.sendall(bytes(HEADER_BYTES))
        return bool(sock.recv(4096))
    return False


def elsewhere(replica: Replica) -> Replica:
    """The same replica as a router of another node reaches it."""
    return replica_at(Address("node-b", "", replica.address.host, replica.address.port))


def test_a_stranger_who_hammers_is_closed_at_accept_and_routers_are_served() -> None:
    with serving(tcp=True) as (server, replica):
        heard = [knock(server) for _ in range(100)]
        assert FREE <= sum(heard) <= FREE + 5
        assert not heard[-1]
        with transport() as local, transport() as remote:
            answered(local, replica, batch())
            answered(remote, elsewhere(replica), batch())
        assert not knock(server)


def test_a_router_that_was_known_returns_to_the_address_of_a_hammering_stranger() -> None:
    with serving(tcp=True) as (server, replica):
        with transport() as router:
            answered(router, elsewhere(replica), batch())
        assert sum(knock(server, "127.0.0.1") for _ in range(100)) == 100
        with transport() as router:
            answered(router, elsewhere(replica), batch())


def test_a_router_of_another_model_is_refused_and_makes_no_trouble() -> None:
    with serving(tcp=True) as (_, replica):
        for _ in range(2 * int(FREE)):
            with transport(digest=bytes(32)) as old, pytest.raises(HandshakeError, match="model digest"):
                old.send(elsewhere(replica), batch(), WAIT_S)
        with transport() as router:
            answered(router, elsewhere(replica), batch())


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How often servers have looked for something to do."""
    seen: list[float] = []
    poll = connections.Poller.poll

    def counted(self: connections.Poller[object], timeout_s: float) -> list[tuple[object, int]]:
        seen.append(timeout_s)
        return poll(self, timeout_s)

    monkeypatch.setattr(connections.Poller, "poll", counted)
    return seen


@pytest.mark.parametrize("where", ["accept", "register"])
def test_a_server_that_runs_out_of_files_rests_and_serves_who_waited(
    where: str, monkeypatch: pytest.MonkeyPatch, polls: list[float]
) -> None:
    """Neither spinning nor ending: a quarter of a second is a few looks, not thousands, and who waits is served."""
    until_s = time.monotonic() + 0.25
    failures: list[float] = []

    def exhausted() -> None:
        if time.monotonic() < until_s:
            failures.append(time.monotonic())
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with serving(limits=ServerLimits(handshake_s=0.4)) as (server, replica):
        if where == "accept":
            listener = server._connections._listeners[0]

            class Listener:
                """A socket whose `accept` fails at first."""

                def accept(self) -> tuple[socket.socket, object]:
                    exhausted()
                    return listener.accept()

                def fileno(self) -> int:
                    return listener.fileno()

            original = server._connections._accept
            fake = Listener()
            server._connections._poller._targets[listener.fileno()] = lambda: original(fake)  # type: ignore[arg-type]
            monkeypatch.setattr(server._connections, "_accept", lambda _: original(fake))  # type: ignore[arg-type]
        else:
            register = server._connections._poller.register

            def refusing(sock: socket.socket | int, events: int, target: object) -> None:
                if isinstance(target, connections.Connection):
                    exhausted()
                register(sock, events, target)  # type: ignore[arg-type]

            monkeypatch.setattr(server._connections._poller, "register", refusing)
        files, before = open_files(), len(polls)
        with transport() as stream:
            if where == "accept":
                answered(stream, replica, batch())
            else:
                while time.monotonic() < until_s:
                    with wired(server) as wire, suppress(ConnectionError):
                        wire.join()
                answered(stream, replica, batch())
        assert 1 <= len(failures) <= 5
        assert len(polls) - before < 100
        until(lambda: open_files() <= files + 1)
        assert server.alive


# -- any bytes ---------------------------------------------------------------------------------------------------------


def headers(kind: Kind) -> bytes:
    """A whole frame to change."""
    return b"".join(map(bytes, encode(kind, 7, digest8=DIGEST[:8], body=bytes(40))))


BYTES = st.one_of(
    st.binary(max_size=400),
    st.binary(max_size=200).map(lambda tail: MAGIC + b"\1" + tail),
    st.tuples(
        st.sampled_from([Kind.HELLO, Kind.PROOF, Kind.RESULT, Kind.ERROR, Kind.PING]),
        st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), max_size=6),
    ).map(lambda made: bytes(dict(made[1]).get(i, byte) for i, byte in enumerate(headers(made[0])))),
)


class Pieces:
    """A source of bytes in pieces; what is asked for beyond the end is the end of the stream."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.data[: min(self.size, len(buffer))]
        buffer[: len(piece)] = piece
        self.data = self.data[len(piece) :]
        return len(piece)


@settings(max_examples=400, deadline=None)
@given(data=st.lists(BYTES, max_size=4).map(b"".join), size=st.integers(1, 500), known=st.booleans())
def test_a_reader_makes_frames_or_a_frame_error_of_any_bytes_in_bounded_memory(
    data: bytes, size: int, known: bool
) -> None:
    limits = Limits(rows=64, payload_bytes=1 << 16, control_bytes=256, counts=16) if known else HANDSHAKE_LIMITS
    reader = FrameReader(limits, DIGEST[:8] if known else None)
    source = Pieces(data, size)
    tracemalloc.start()
    try:
        while source.data:
            reader.receive(source)
    except FrameError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < (1 << 18)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(BYTES, min_size=1, max_size=4), stage=st.sampled_from(["hello", "proof", "router"]))
def test_a_server_survives_any_bytes_at_any_stage_and_serves_the_next_router(
    lasting: tuple[ExpertServer, Replica], frames: list[bytes], stage: str
) -> None:
    server, replica = lasting
    with wired(server) as wire:
        if stage == "router":
            wire.join()
        elif stage == "proof":
            wire.send(RouterHandshake(KEY, Identity(DIGEST, "experts-0", "replica-0"), bytes(NONCE_BYTES)).hello())
            assert wire.read().kind is Kind.CHALLENGE
        with suppress(OSError):
            wire.send(frames)
            wire.sock.shutdown(socket.SHUT_WR)
        known = {Kind.ERROR, Kind.REFUSED, Kind.CHALLENGE, Kind.PONG}
        assert {frame.kind for frame in wire.read_to_end()} <= known
    with transport() as router:
        answered(router, replica, batch())
    assert server.alive


@pytest.fixture(scope="module")
def lasting() -> Iterator[tuple[ExpertServer, Replica]]:
    """One server for all bytes."""
    with serving(limits=ServerLimits(frame=Limits(rows=64, payload_bytes=4096, control_bytes=256, counts=16))) as made:
        yield made


def test_a_recorded_handshake_opens_no_connection_to_the_same_server() -> None:
    recorded: list[bytes] = []
    with serving() as (server, _):
        with wired(server) as wire:
            send = wire.send

            def record(buffers: list[bytes]) -> None:
                recorded.append(b"".join(map(bytes, buffers)))
                send(buffers)

            wire.send = record  # type: ignore[method-assign, assignment]
            wire.join()
        with wired(server) as thief:
            # Its last word is empty, and comes when the server may have hung up.
            for data in filter(None, recorded):
                thief.send([data])
            said = thief.read_to_end()
        assert [frame.kind for frame in said] == [Kind.CHALLENGE, Kind.REFUSED]
        assert b"wrong cluster key" in said[1].data
        until(lambda: server.stats().connections == 0)


def test_whoever_has_the_key_is_proved_even_where_it_is_refused() -> None:
    handshake = ReplicaHandshake(KEY, Identity(bytes(32), "experts-0", "replica-0"), bytes(NONCE_BYTES))
    router = RouterHandshake(KEY, Identity(DIGEST, "experts-0", "replica-0"), bytes(NONCE_BYTES))
    source = FrameReader(HANDSHAKE_LIMITS)
    (hello,) = source.receive(Pieces(b"".join(map(bytes, router.hello())), 1 << 16))
    (challenge,) = source.receive(Pieces(b"".join(map(bytes, handshake.answer(hello))), 1 << 16))
    (proof,) = source.receive(Pieces(b"".join(map(bytes, router.answer(challenge))), 1 << 16))
    assert not handshake.proved
    with pytest.raises(HandshakeError, match="model digest"):
        handshake.answer(proof)
    assert handshake.proved
    assert not handshake.done

"""The handshake as two state machines: both prove the key, and every mismatch has its own reason. 1 s."""

from __future__ import annotations

import hmac
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import HandshakeError
from cluster.fabric.frame_io import FrameReader
from cluster.fabric.frames import HANDSHAKE_LIMITS, Buffer, Frame, Kind
from cluster.fabric.handshake import Identity, ReplicaHandshake, RouterHandshake, refusal

KEY = b"the cluster's key"
OWN = Identity(bytes(range(32)), "experts-0", "replica-0")
ROUTER_NONCE, REPLICA_NONCE = b"r" * 32, b"e" * 32


def router(key: bytes = KEY, wanted: Identity = OWN) -> RouterHandshake:
    return RouterHandshake(key, wanted, ROUTER_NONCE)


def replica(key: bytes = KEY, own: Identity = OWN, nonce: bytes = REPLICA_NONCE) -> ReplicaHandshake:
    return ReplicaHandshake(key, own, nonce)


def received(buffers: list[Buffer]) -> Frame:
    """The frame as the other side reads it."""

    class Once:
        def recv_into(self, buffer: memoryview) -> int:
            data = b"".join(bytes(b) for b in buffers)
            buffer[: len(data)] = data
            return len(data)

    (frame,) = FrameReader(HANDSHAKE_LIMITS).receive(Once())
    return frame


def shake(left: RouterHandshake, right: ReplicaHandshake) -> None:
    buffers = left.hello()
    while not left.done:
        buffers = left.answer(received(right.answer(received(buffers))))


def test_both_sides_prove_the_key() -> None:
    left, right = router(), replica()
    shake(left, right)
    assert left.done
    assert right.done


@pytest.mark.parametrize(
    ("wanted", "key", "reason"),
    [
        (OWN, b"another key", "wrong cluster key"),
        (replace(OWN, digest=bytes(32)), KEY, "wrong model digest 0000000000000000.*serves 0001020304050607"),
        (replace(OWN, replica_id="replica-1"), KEY, "wrong replica: replica-1 of experts-0 was wanted"),
        (replace(OWN, group="experts-1"), KEY, "wrong replica: replica-0 of experts-1 was wanted"),
    ],
)
def test_each_mismatch_is_refused_with_its_own_reason(wanted: Identity, key: bytes, reason: str) -> None:
    right = replica()
    with pytest.raises(HandshakeError, match=reason):
        shake(router(key, wanted), right)
    assert not right.done


def test_a_router_with_another_key_learns_nothing_of_the_model() -> None:
    right = replica()
    left = router(b"another key", replace(OWN, digest=bytes(32)))
    challenge = received(right.answer(received(left.hello())))
    assert bytes(challenge.data) == REPLICA_NONCE
    with pytest.raises(HandshakeError, match="wrong cluster key"):
        right.answer(received(left.answer(challenge)))


def test_a_replica_that_cannot_prove_the_key_is_refused() -> None:
    left = router()
    left.answer(Frame(Kind.CHALLENGE, data=REPLICA_NONCE))
    with pytest.raises(HandshakeError, match="does not have this cluster's key"):
        left.answer(Frame(Kind.WELCOME, data=hmac.new(b"guess", digestmod=sha256).digest()))


def test_a_routers_own_proof_does_not_welcome_it() -> None:
    left = router()
    proof = received(left.answer(Frame(Kind.CHALLENGE, data=REPLICA_NONCE)))
    with pytest.raises(HandshakeError, match="does not have this cluster's key"):
        left.answer(Frame(Kind.WELCOME, data=proof.data))


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    left = router()
    hello = received(left.hello())
    proof = received(left.answer(received(replica().answer(hello))))
    other = replica(nonce=b"f" * 32)
    other.answer(hello)
    with pytest.raises(HandshakeError, match="wrong cluster key"):
        other.answer(proof)


def test_the_reason_of_a_refusal_reaches_the_router() -> None:
    with pytest.raises(HandshakeError, match="replica-0 refuses this router: no room"):
        router().answer(received(refusal("no room")))
    assert len(received(refusal("é" * 1000)).data) <= 512


@pytest.mark.parametrize("kind", [Kind.WELCOME, Kind.HELLO])
def test_a_router_refuses_frames_out_of_turn(kind: Kind) -> None:
    with pytest.raises(HandshakeError, match=f"{kind.name} out of turn"):
        router().answer(Frame(kind, data=b"x" * 32))


@pytest.mark.parametrize("kind", [Kind.PROOF, Kind.WELCOME, Kind.REFUSED])
def test_a_replica_refuses_frames_out_of_turn(kind: Kind) -> None:
    with pytest.raises(HandshakeError, match=f"{kind.name} out of turn"):
        replica().answer(Frame(kind, data=b"x" * 32))


def test_a_second_challenge_or_hello_is_out_of_turn() -> None:
    left, right = router(), replica()
    hello = received(left.hello())
    challenge = received(right.answer(hello))
    left.answer(challenge)
    with pytest.raises(HandshakeError, match="CHALLENGE out of turn"):
        left.answer(challenge)
    with pytest.raises(HandshakeError, match="HELLO out of turn"):
        right.answer(hello)


@given(st.binary(max_size=200))
def test_a_hello_of_random_bytes_is_refused_even_with_a_true_proof(hello: bytes) -> None:
    right = replica()
    right.answer(Frame(Kind.HELLO, data=hello))
    left = router()
    left._hello = hello
    proof = received(left.answer(Frame(Kind.CHALLENGE, data=REPLICA_NONCE)))
    with pytest.raises(HandshakeError):
        right.answer(proof)


@pytest.mark.parametrize("wanted", [replace(OWN, digest=b"short"), replace(OWN, replica_id="r" * 257)])
def test_an_identity_that_does_not_fit_is_refused_at_once(wanted: Identity) -> None:
    with pytest.raises(HandshakeError):
        router(wanted=wanted)

"""Mutual proof of the cluster key when a router connects to an expert replica: HMAC-SHA256 challenge and response.

    router   HELLO      nonce, model digest, group and replica id it wants
    replica  CHALLENGE  nonce
    router   PROOF      HMAC(key, version | "router"  | hello | challenge)
    replica  WELCOME    HMAC(key, version | "replica" | hello | challenge), or REFUSED with a reason

The listening side proves itself last, so that a stranger learns nothing from it, not even which model it serves. Roles
in the MAC prevent reflection, nonces replay. It authenticates the connection; later frames are neither encrypted nor
signed, so the network between nodes must be trusted. Two pure state machines: they know no socket and no clock; nonces
are passed in.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from hashlib import sha256

from cluster.errors import HandshakeError
from cluster.fabric import WIRE_VERSION
from cluster.fabric.frames import Buffer, Frame, Kind, encode

NONCE_BYTES = 32
DIGEST_BYTES = 32
_LENGTHS = struct.Struct("<HH")
_FIXED_BYTES = NONCE_BYTES + DIGEST_BYTES + _LENGTHS.size
_NAME_BYTES = 256


@dataclass(frozen=True)
class Identity:
    """Who a router wants to reach, and who a replica is: `digest` is the model digest, 32 bytes."""

    digest: bytes
    group: str
    replica_id: str


class RouterHandshake:
    """The connecting side. Send `hello()`, then answer every frame with `answer(frame)` until `done`.

    Raises, from the constructor and `answer`:
        HandshakeError: the replica refuses, says something else, or cannot prove the key; the message says which.
    """

    def __init__(self, key: bytes, wanted: Identity, nonce: bytes) -> None:
        self.done = False
        self._key = key
        self._wanted = wanted
        self._hello = _pack_hello(wanted, nonce)
        self._challenge: bytes | None = None

    def hello(self) -> list[Buffer]:
        """The first frame."""
        return encode(Kind.HELLO, body=self._hello)

    def answer(self, frame: Frame) -> list[Buffer]:
        """The reply to `frame`; empty when the handshake is over."""
        data = bytes(frame.data)
        if frame.kind is Kind.REFUSED:
            reason = data.decode("utf-8", "replace")
            raise HandshakeError(f"{self._wanted.replica_id} refuses this router: {reason}")
        if frame.kind is Kind.CHALLENGE and self._challenge is None and len(data) == NONCE_BYTES:
            self._challenge = data
            return encode(Kind.PROOF, body=_mac(self._key, b"router", self._hello, data))
        if frame.kind is Kind.WELCOME and self._challenge is not None:
            if not hmac.compare_digest(data, _mac(self._key, b"replica", self._hello, self._challenge)):
                raise HandshakeError(f"{self._wanted.replica_id} does not have this cluster's key.")
            self.done = True
            return []
        raise HandshakeError(f"{self._wanted.replica_id} sent {frame.kind.name} out of turn during the handshake.")


class ReplicaHandshake:
    """The listening side: give every frame to `answer` and send what it returns, until `done`.

    proved: the other side has the cluster key, welcome or not.

    Raises, from `answer`:
        HandshakeError: the router is refused; the message is the reason to send (`refusal`) before closing.
    """

    def __init__(self, key: bytes, own: Identity, nonce: bytes) -> None:
        self.done = self.proved = False
        self._key = key
        self._own = own
        self._challenge = nonce
        self._hello: bytes | None = None

    def answer(self, frame: Frame) -> list[Buffer]:
        """The reply to `frame`."""
        data = bytes(frame.data)
        if frame.kind is Kind.HELLO and self._hello is None:
            self._hello = data
            return encode(Kind.CHALLENGE, body=self._challenge)
        if frame.kind is Kind.PROOF and self._hello is not None:
            if not hmac.compare_digest(data, _mac(self._key, b"router", self._hello, self._challenge)):
                raise HandshakeError("wrong cluster key.")
            self.proved = True
            self._check(_unpack_hello(self._hello))
            self.done = True
            return encode(Kind.WELCOME, body=_mac(self._key, b"replica", self._hello, self._challenge))
        raise HandshakeError(f"{frame.kind.name} out of turn during the handshake.")

    def _check(self, wanted: Identity) -> None:
        own = self._own
        if wanted.digest != own.digest:
            raise HandshakeError(
                f"wrong model digest {wanted.digest.hex()[:16]}...; this replica serves {own.digest.hex()[:16]}..."
            )
        if (wanted.group, wanted.replica_id) != (own.group, own.replica_id):
            raise HandshakeError(
                f"wrong replica: {wanted.replica_id} of {wanted.group} was wanted, "
                f"this is {own.replica_id} of {own.group}."
            )


def refusal(reason: str) -> list[Buffer]:
    """The REFUSED frame with a reason of at most 512 bytes of UTF-8."""
    return encode(Kind.REFUSED, body=reason.encode()[:512])


def _mac(key: bytes, role: bytes, hello: bytes, challenge: bytes) -> bytes:
    head = struct.pack("<H8sI", WIRE_VERSION, role, len(hello))
    return hmac.new(key, head + hello + challenge, sha256).digest()


def _pack_hello(wanted: Identity, nonce: bytes) -> bytes:
    group, replica = wanted.group.encode(), wanted.replica_id.encode()
    if len(nonce) != NONCE_BYTES or len(wanted.digest) != DIGEST_BYTES:
        raise HandshakeError(f"the nonce needs {NONCE_BYTES} bytes and the model digest {DIGEST_BYTES}.")
    if max(len(group), len(replica)) > _NAME_BYTES:
        raise HandshakeError(f"group and replica id may have {_NAME_BYTES} bytes each.")
    return nonce + wanted.digest + _LENGTHS.pack(len(group), len(replica)) + group + replica


def _unpack_hello(hello: bytes) -> Identity:
    try:
        group_bytes, replica_bytes = _LENGTHS.unpack_from(hello, NONCE_BYTES + DIGEST_BYTES)
        if len(hello) != _FIXED_BYTES + group_bytes + replica_bytes:
            raise ValueError
        middle = _FIXED_BYTES + group_bytes
        group, replica = hello[_FIXED_BYTES:middle].decode(), hello[middle:].decode()
    except (struct.error, ValueError):
        raise HandshakeError("a HELLO that cannot be read.") from None
    return Identity(hello[NONCE_BYTES : NONCE_BYTES + DIGEST_BYTES], group, replica)

"""A double of an expert replica: it holds the cluster key, computes rightly, and misbehaves as a test says.

Runs in threads of the test's own process, one per connection. The first `after` batches are answered as they should
be, so that a fault comes in the middle of a step; all later ones, of whichever connection, meet the fault.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from cluster.blueprint import Blueprint
from cluster.config import ExpertsSpec
from cluster.fabric.frames import Buffer, Frame, Kind, Limits, Status, encode
from cluster.fabric.handshake import NONCE_BYTES, Identity, ReplicaHandshake
from cluster.membership import Replica
from deployments.experts.replica import ExpertReplica
from tests.cluster.fabric.serving import Wire
from tests.expert_pool import KEY, NODE

GARBAGE_BYTES = 4096
TRICKLE_S = 1.0


class Hangs(Exception):
    """The connection is left open and nothing more is said on it."""


class FaultyReplica:
    """Replica `index` of a blueprint as a router may meet it. A context manager.

    fault: called with (connection, frame, right result) instead of an answer. answers_handshakes: False for one that
    accepts and never says anything. faults: how many batches have met the fault.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        spec: ExpertsSpec,
        index: int,
        fault: Fault,
        *,
        replica_id: str,
        after: int = 6,
        answers_handshakes: bool = True,
    ) -> None:
        self.faults = 0
        self._fault = fault
        self._left = after
        self._answers_handshakes = answers_handshakes
        self._experts = ExpertReplica(blueprint, spec, index, replica_id=replica_id, key=KEY, node=NODE, host=None)
        self._folder = tempfile.TemporaryDirectory(prefix="xf-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = []
        self.closing = threading.Event()

    def __enter__(self) -> FaultyReplica:
        self._listener.bind(os.path.join(self._folder.name, "s"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._experts.close()
        self._folder.cleanup()

    def record(self) -> Replica:
        """What a directory would be told."""
        good = self._experts.record()
        return replace(good, address=replace(good.address, unix_path=os.path.join(self._folder.name, "s")))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        # OSError: the other side, or the end of the test, closed it. ValueError: closed while it was being read.
        with suppress(OSError, ValueError):
            wire = Wire(sock)
            sock.settimeout(None)
            try:
                self._greet(wire)
                with torch.inference_mode():
                    while True:
                        self._answer(wire, wire.read())
            except Hangs:
                self.closing.wait()
            wire.close()

    def _greet(self, wire: Wire) -> None:
        if not self._answers_handshakes:
            raise Hangs
        record = self._experts.record()
        identity = Identity(bytes.fromhex(record.digest), record.group, record.id)
        handshake = ReplicaHandshake(KEY, identity, secrets.token_bytes(NONCE_BYTES))
        while not handshake.done:
            wire.send(handshake.answer(wire.read()))
        wire.reader.expect(Limits(), None)

    def _answer(self, wire: Wire, frame: Frame) -> None:
        if frame.kind is not Kind.ROWS or frame.counts is None or frame.tensor is None:
            return
        start = time.perf_counter()
        output = self._experts.compute(frame.layer, frame.counts, frame.tensor)
        if self._left > 0:
            self._left -= 1
            wire.send(self.result(frame, output, compute_s=time.perf_counter() - start))
            return
        self.faults += 1
        self._fault(self, wire, frame, output)

    def result(
        self,
        frame: Frame,
        body: Tensor,
        *,
        sequence: int | None = None,
        digest8: bytes | None = None,
        compute_s: float = 0.0,
    ) -> list[Buffer]:
        """A RESULT frame that answers `frame`, or what is made of it."""
        own8 = bytes.fromhex(self._experts.record().digest)[:8]
        return encode(
            Kind.RESULT,
            frame.sequence if sequence is None else sequence,
            digest8=own8 if digest8 is None else digest8,
            compute_us=int(compute_s * 1e6),
            body=body,
        )

    def error(self, frame: Frame) -> list[Buffer]:
        """An ERROR frame: the experts raised."""
        own8 = bytes.fromhex(self._experts.record().digest)[:8]
        return encode(Kind.ERROR, frame.sequence, digest8=own8, status=Status.FAILED, body=b"ValueError: out of luck")


Fault = Callable[[FaultyReplica, Wire, Frame, Tensor], None]


def joined(buffers: Sequence[Buffer]) -> bytes:
    """A frame in one piece."""
    return b"".join(bytes(buffer) for buffer in buffers)


def garbage(_: FaultyReplica, wire: Wire, frame: Frame, __: Tensor) -> None:
    """Bytes that are no frame."""
    wire.send([random.Random(frame.sequence).randbytes(GARBAGE_BYTES)])


def half_a_frame(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """Half an answer, then silence."""
    whole = joined(replica.result(frame, output))
    wire.send([whole[: len(whole) // 2]])
    raise Hangs


def closes_in_a_payload(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """Half an answer, then the end."""
    whole = joined(replica.result(frame, output))
    wire.send([whole[: len(whole) // 2]])
    wire.sock.shutdown(socket.SHUT_RDWR)


def wrong_size(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """One row too many."""
    wire.send(replica.result(frame, torch.cat([output, output[:1]])))


def wrong_dtype(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """The right rows in another type."""
    wire.send(replica.result(frame, output.bfloat16()))


def unknown_sequence(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """An answer to nothing that was asked."""
    wire.send(replica.result(frame, output, sequence=frame.sequence + 1000))


def another_digest(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """The answer of another model."""
    wire.send(replica.result(frame, output, digest8=bytes(8)))


def raises(replica: FaultyReplica, wire: Wire, frame: Frame, _: Tensor) -> None:
    """The experts fail, here alone."""
    wire.send(replica.error(frame))


def silent(_: FaultyReplica, __: Wire, ___: Frame, ____: Tensor) -> None:
    """No answer at all; frames are still read."""


def trickles(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
    """The right answer, one byte a second."""
    for byte in joined(replica.result(frame, output)):
        wire.send([bytes([byte])])
        if replica.closing.wait(TRICKLE_S):
            return


def slow(delay_s: float) -> Fault:
    """The right answer, later; it says nothing of the reason."""

    def answer(replica: FaultyReplica, wire: Wire, frame: Frame, output: Tensor) -> None:
        replica.closing.wait(delay_s)
        wire.send(replica.result(frame, output))

    return answer

"""What the stream's tests share: servers in threads of this process, replicas that name them, and bare connections."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.fabric.frame_io import FrameReader
from cluster.fabric.frames import HANDSHAKE_LIMITS, Buffer, Frame, Limits
from cluster.fabric.handshake import NONCE_BYTES, Identity, ReplicaHandshake, RouterHandshake
from cluster.fabric.links import Link
from cluster.fabric.server import ExpertServer, ServedGroup
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import Batch, Call
from cluster.membership import Address, Replica

KEY = b"k" * 32
DIGEST = bytes(range(32))
NODE = "node-a"
HIDDEN = 8
EXPERTS = 3
LAYERS = (0, 1)
WAIT_S = 20.0


def times_expert(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
    """Expert e of layer l multiplies by 1 + e + 10 l: what came from where can be read off the result."""
    factor = (1 + torch.arange(len(counts)) + 10 * layer).repeat_interleave(counts)
    return rows * factor.to(rows.dtype).reshape(-1, 1)


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread makes true."""
    give_up_at = time.monotonic() + WAIT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < give_up_at, "the condition never came true"
        pause.wait(0.001)


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A short path with mode 0700."""
    with TemporaryDirectory(prefix="es-") as folder:
        yield Path(folder)


@contextmanager
def serving(
    compute: Callable[[int, Tensor, Tensor], Tensor] = times_expert,
    *,
    replica_id: str = "replica-0",
    dtype: torch.dtype = torch.float32,
    hidden: int = HIDDEN,
    tcp: bool = False,
    **options: Any,
) -> Iterator[tuple[ExpertServer, Replica]]:
    """A running server of group experts-0 and the replica that names it."""
    shape = ServedGroup("experts-0", replica_id, dtype, dict.fromkeys(LAYERS, hidden), dict.fromkeys(LAYERS, EXPERTS))
    with socket_folder() as folder:
        server = ExpertServer(
            compute,
            shape=shape,
            digest=DIGEST,
            key=KEY,
            unix_path=str(folder / "s"),
            host="127.0.0.1" if tcp else None,
            **options,
        )
        server.start()
        try:
            yield server, replica_at(Address(NODE, *server.address), replica_id)
        finally:
            server.close()


def replica_at(address: Address, replica_id: str = "replica-0") -> Replica:
    return Replica(replica_id, "experts-0", "default", address, DIGEST.hex(), 1.0)


@contextmanager
def transport(**options: Any) -> Iterator[StreamTransport]:
    stream = StreamTransport(**({"key": KEY, "digest": DIGEST, "node_id": NODE} | options))
    try:
        yield stream
    finally:
        stream.close()


def batch(
    counts: Sequence[int] = (2, 0, 1), *, layer: int = 0, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32
) -> Batch:
    """Random rows; a token is used by one row or several."""
    rows = sum(counts)
    return Batch("experts-0", layer, np.array(counts), np.arange(rows) // 2, torch.randn(rows, hidden).to(dtype))


def expected(sent: Batch) -> Tensor:
    return times_expert(sent.layer, torch.from_numpy(sent.counts), sent.hidden[sent.index])


def finished(stream: StreamTransport, calls: Sequence[Call]) -> list[Call]:
    """Wait for all of `calls`; in order of arrival."""
    done: list[Call] = []
    while len(done) < len(calls):
        news = stream.wait([call for call in calls if call not in done], WAIT_S)
        assert news, "a call was never answered"
        done += news
    return done


def answered(stream: StreamTransport, replica: Replica, sent: Batch) -> Link:
    """Send a batch, check its result; the link it took."""
    call = stream.send(replica, sent, WAIT_S)
    finished(stream, [call])
    assert torch.equal(call.result(), expected(sent))
    return stream._links[replica.id]


def open_files() -> int:
    """Descriptors of this process, those included that only garbage holds."""
    return len(os.listdir("/proc/self/fd"))


def kept_files() -> int:
    """Descriptors that somebody still holds: earlier tests leave garbage, which goes when it pleases."""
    gc.collect()
    return open_files()


@dataclass
class Gate:
    """A compute that waits until `open` is set, says that it was `entered`, and remembers what it was called with."""

    open: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[tuple[int, list[int]]] = field(default_factory=list)

    def __call__(self, layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        self.batches.append((layer, counts.tolist()))
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return times_expert(layer, counts, rows)

    def shut(self) -> None:
        """From the next call on."""
        self.open.clear()
        self.entered.clear()
        self.batches.clear()


class Wire:
    """A bare connection: sends any bytes, reads frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(WAIT_S)
        self.reader = FrameReader(HANDSHAKE_LIMITS)
        self._frames: list[Frame] = []

    @classmethod
    def to(cls, path: str) -> Wire:
        wire = cls(socket.socket(socket.AF_UNIX))
        wire.sock.connect(path)
        return wire

    def send(self, buffers: Sequence[Buffer]) -> None:
        self.sock.sendall(b"".join(bytes(buffer) for buffer in buffers))

    def read(self) -> Frame:
        """The next frame; ConnectionError at the end of the stream."""
        while not self._frames:
            self._frames = self.reader.receive(self.sock)
        return self._frames.pop(0)

    def read_to_end(self) -> list[Frame]:
        """Every frame until the other side closes the connection."""
        frames = []
        with suppress(ConnectionError):
            while True:
                frames.append(self.read())
        return frames

    def join(self, key: bytes = KEY, replica_id: str = "replica-0") -> Wire:
        """Do the router's handshake."""
        handshake = RouterHandshake(key, Identity(DIGEST, "experts-0", replica_id), bytes(NONCE_BYTES))
        self.send(handshake.hello())
        while not handshake.done:
            self.send(handshake.answer(self.read()))
        self.reader.expect(Limits(), DIGEST[:8])
        return self

    def close(self) -> None:
        self.sock.close()


@contextmanager
def wired(server: ExpertServer) -> Iterator[Wire]:
    wire = Wire.to(server.address[0])
    try:
        yield wire
    finally:
        wire.close()


def unheard(wire: Wire, frame: Frame) -> None:
    """What comes by socket is not answered."""


@contextmanager
def impostor(answer: Callable[[Wire, Frame], None], key: bytes = KEY, files: Sequence[int] = ()) -> Iterator[Replica]:
    """A replica that shakes hands like a server and then does what the test says with every frame.

    files: go along with its last frame of the handshake.
    """
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(folder / "s")
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            wire = Wire(listener.accept()[0])
            handshake = ReplicaHandshake(key, Identity(DIGEST, "experts-0", "replica-0"), bytes(NONCE_BYTES))
            with suppress(OSError):
                while not handshake.done:
                    reply = handshake.answer(wire.read())
                    if handshake.done and files:
                        socket.send_fds(wire.sock, reply, files)
                    else:
                        wire.send(reply)
                wire.reader.expect(Limits(), None)
                while True:
                    answer(wire, wire.read())
            wire.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield replica_at(Address(NODE, path, "", 0))
        thread.join(WAIT_S)

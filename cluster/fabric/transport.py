"""What every transport offers: rows of one (layer, group) go to a replica, as many rows come back.

This file is the interface alone. It does not know how bytes travel (`stream`, `object_store`, `local`), nor which
replica is chosen or what happens when one is lost (`dispatch`).
Dimension letters: T tokens, H hidden, R rows, E experts of the group in that layer.

Threads: a transport belongs to one thread (the engine's): `prepare`, `send`, `wait`, `forget`, `retain` and `close` are
called there. Only the byte counters may be read from elsewhere.

Errors of a call (`Call.error`), never raised by `wait`:
    ReplicaLostError   broken connection, or the batch reached the replica after its deadline: send it elsewhere.
    FabricError        the replica answered that it cannot compute this batch; its message says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cluster.errors import FabricError
from cluster.fabric.words import as_words
from cluster.membership import Replica

FIRST, RESEND, HEDGE, PROBE = "first", "resend", "hedge", "probe"
"""Why a batch is sent: for the first time; after a failure or a wait for a replica, if only its connection failed or
there was none; because another one with these rows is late; to learn."""


@dataclass(slots=True)
class Batch:
    """The rows one group computes in one layer of one step.

    counts: int64 [E], rows per expert in order of the group's sorted expert ids of that layer.
    index: int64 [R], the token of each row, rows sorted by expert; R == counts.sum() >= 1.
    hidden: [T, H], the whole input of the layer; the rows are `hidden[index]`. Not changed until the call is done.
    rows: gathers the rows, where the sender knows a better way than one by one; see `gathered`.
    into: [R * H * item size] bytes where a transport may leave the results instead of handing out a tensor of its own;
        nobody else writes there until the call is done or forgotten. `placed`: it did.
    attempt: why it is sent. trace: the context of its span (`frames.TRACE_BYTES`), which goes along; b"" without.
    """

    group: str
    layer: int
    counts: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    hidden: Tensor
    rows: Callable[[], memoryview] | None = None
    into: memoryview | None = None
    placed: bool = False
    attempt: str = FIRST
    trace: bytes = b""

    def gathered(self) -> memoryview:
        """The bytes of the rows, [R, H] contiguous."""
        if self.rows is not None:
            return self.rows()
        return as_words(self.hidden)[self.index].data.cast("B")


class Call(Protocol):
    """One batch on its way. `done` turns true once, inside `wait` or `send`, and stays so."""

    @property
    def sequence(self) -> int:
        """Unique within its transport."""

    @property
    def replica_id(self) -> str:
        """Who was asked."""

    @property
    def transport(self) -> str:
        """How it travels: the name of the transport, of its part where that has several."""

    @property
    def done(self) -> bool:
        """Whether `result` returns or raises instead of refusing."""

    @property
    def error(self) -> FabricError | None:
        """Why there is no result; None while it is not done, and where there is a result."""

    @property
    def queue_rows(self) -> int:
        """Rows that waited at the replica when it answered; 0 before."""

    @property
    def compute_s(self) -> float:
        """Seconds the replica spent on the batch these rows were part of, as its device would; 0 before."""

    def result(self) -> Tensor:
        """[R, H], the experts' outputs in the order and dtype of the rows sent, unweighted; may be a view of a buffer
        that belongs to this call alone.

        Raises:
            FabricError: `error`, or the call is not done.
        """


class Transport(Protocol):
    """Sends batches and collects results."""

    @property
    def name(self) -> str:
        """`stream`, `object_store`, `local`: the key of `transport_bytes`."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of hidden states and framing handed to replicas so far."""

    @property
    def bytes_received(self) -> int:
        """Bytes of results and framing taken from replicas so far."""

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        """Begin to connect to `replica`; whether it is connected `patience_s` after that has begun, so that `send`
        would not block. Raises what `send` raises, once, where connecting has failed.
        """

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        """Start one call; returns without waiting for the result. `deadline_s` is the time left, in seconds.

        Raises:
            ReplicaLostError: the replica cannot be reached, is draining, or its connection is broken.
            HandshakeError: it has another cluster key, model digest or wire version.
        """

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        """The calls among `calls` that are done, in order of arrival; blocks until there is one, `[]` on timeout."""

    def forget(self, call: Call, *, watched: bool = False) -> None:
        """Nobody wants this result any more; it is dropped when it arrives. Idempotent.

        watched: somebody still looks at `done` during later waits, then at `error`, `compute_s` and `queue_rows`, and
        calls `forget` again. Until then what the replica needs for an answer is kept.
        """

    def retain(self, replica_ids: Collection[str]) -> None:
        """Close the connections to all replicas but these; their open calls end with ReplicaLostError."""

    def close(self) -> None:
        """Close everything; open calls end with ReplicaLostError. Idempotent."""


class ReferenceCodec(Protocol):
    """How an expert server turns references into rows and back, for transports whose rows do not travel in frames.

    Every method is called in the server's thread. What `store` returned is held until `release`, which the server calls
    exactly once per token: when the router acknowledges, or when its connection ends.
    """

    def load(self, payload: bytes, counts: Tensor) -> Tensor:
        """The rows [R, H] that `payload` refers to; `counts` is int64 [E].

        Raises:
            FabricError: they cannot be had; the router gets the message.
        """

    def store(self, rows: Tensor) -> tuple[object, bytes]:
        """Publish the result rows [R, H]; returns (token, payload that a router can load)."""

    def release(self, token: object) -> None:
        """The router has read the rows, or is gone."""

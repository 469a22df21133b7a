"""The object-store transport: the hidden states of a layer are put once, every group takes its rows from there.

A REFERENCE frame on the stream's connections carries the name of the object and the token of each row; the replica
answers with the name of the object that holds its results, and RELEASE tells it that they were read.

    router   put hidden ------- holds it until every call on it has ended --------------- drops it
    replica      get, copy rows, compute, put results -- holds them until RELEASE -- drops them
    router                                          get results, copy, RELEASE

A lost object is a lost replica to the dispatcher: the rows are sent again. Knows neither sockets (`stream`), nor bytes
of a payload (`store_codec`), nor Ray (`ray_references`).
Dimension letters: H hidden, R rows.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from cluster.errors import FabricError
from cluster.fabric.links import StreamCall
from cluster.fabric.store_codec import References, publish, read, request
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import Batch, Call
from cluster.membership import Replica


class _Published:
    """Hidden states in the store, for as long as calls on them are open."""

    __slots__ = ("description", "hidden", "holding", "open_calls")

    def __init__(self, hidden: Tensor, holding: object, description: bytes) -> None:
        self.hidden = hidden
        self.holding: object = holding
        self.description = description
        self.open_calls = 0


class StoreCall:
    """One batch on its way through the store; see `transport.Call`."""

    __slots__ = ("_error", "_outputs", "_published", "inner", "rows", "watched")

    transport = "object_store"

    def __init__(self, inner: StreamCall, rows: int, published: _Published) -> None:
        self.inner = inner
        self.rows = rows
        self.watched = False
        self._error: FabricError | None = None
        self._outputs: Tensor | None = None
        self._published: _Published | None = published

    @property
    def sequence(self) -> int:
        """That of the frame."""
        return self.inner.sequence

    @property
    def replica_id(self) -> str:
        """Who was asked."""
        return self.inner.replica_id

    @property
    def done(self) -> bool:
        """Whether the results were read, or will not come; of a watched call, whether there was an answer."""
        return self._outputs is not None or self._error is not None or (self.watched and self.inner.done)

    @property
    def error(self) -> FabricError | None:
        """Why there is no result."""
        return self.inner.error if self.watched else self._error

    @property
    def queue_rows(self) -> int:
        """As the replica reported."""
        return self.inner.queue_rows

    @property
    def compute_s(self) -> float:
        """As the replica reported."""
        return self.inner.compute_s

    def result(self) -> Tensor:
        """The outputs [R, H]; raises FabricError where there are none."""
        if self._outputs is None:
            raise self.error or FabricError("the call is not done.")
        return self._outputs

    def settle(self, outcome: Tensor | FabricError | None) -> _Published | None:
        """End the call, with None if nobody waits for it. Returns its hidden states the first time."""
        if isinstance(outcome, FabricError):
            self._error = outcome
        else:
            self._outputs = outcome
        published, self._published = self._published, None
        return published


class ObjectStoreTransport:
    """Rides on the connections of a stream; used by the thread that uses the stream.

    Calls of the stream's own may be waited for and forgotten here too, so that `auto` waits for both in one place.
    The byte counters count what went through the store; the frames are the stream's.
    """

    name = "object_store"

    def __init__(self, stream: StreamTransport, references: References) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._stream = stream
        self._references = references
        self._published: dict[int, _Published] = {}

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        """See `Transport.prepare`; the connections are the stream's."""
        return self._stream.prepare(replica, patience_s)

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        """Put `batch.hidden` unless calls on it are open, and send its name with the tokens of the rows.

        Raises:
            ReplicaLostError, HandshakeError: as the stream does.
            FabricError: the store does not take the hidden states.
        """
        published = self._publish(batch.hidden)
        rows = len(batch.index)
        try:
            inner = self._stream.send_reference(
                replica,
                layer=batch.layer,
                counts=batch.counts,
                rows=rows,
                hidden=batch.hidden.shape[1],
                dtype=batch.hidden.dtype,
                payload=request(published.description, batch.index),
                deadline_s=deadline_s,
                trace=batch.trace,
            )
        except FabricError:
            self._unpublish(published)
            raise
        published.open_calls += 1
        return StoreCall(inner, rows, published)

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        """See `Transport.wait`; the results of finished calls are read here."""
        finished: list[Call] = [call for call in calls if isinstance(call, StoreCall) and call.done]
        if finished:
            return finished
        waiting = {id(call.inner if isinstance(call, StoreCall) else call): call for call in calls}
        inner = [call.inner if isinstance(call, StoreCall) else call for call in calls]
        for arrived in self._stream.wait(inner, timeout_s):
            call = waiting[id(arrived)]
            if isinstance(call, StoreCall):
                self._finish(call)
            finished.append(call)
        return finished

    def forget(self, call: Call, *, watched: bool = False) -> None:
        """See `Transport.forget`. The hidden states of a watched call stay: without them there would be no answer."""
        if not isinstance(call, StoreCall):
            self._stream.forget(call)
        elif call.watched or not call.done:
            self._stream.forget(call.inner)
            call.watched = watched or call.watched
            if not watched:
                self._settle(call, None)

    def retain(self, replica_ids: Collection[str]) -> None:
        """See `Transport.retain`."""
        self._stream.retain(replica_ids)

    def close(self) -> None:
        """See `Transport.close`; drops what was published."""
        self._stream.close()
        for published in self._published.values():
            published.holding = None
        self._published.clear()

    def _publish(self, hidden: Tensor) -> _Published:
        published = self._published.get(id(hidden))
        if published is None:
            holding, description = publish(self._references, hidden)
            self.bytes_sent += hidden.nbytes
            # The tensor is kept with it: as long as it lives, no other can have its id.
            published = self._published[id(hidden)] = _Published(hidden, holding, description)
        return published

    def _unpublish(self, published: _Published) -> None:
        if published.open_calls == 0:
            self._published.pop(id(published.hidden), None)

    def _finish(self, call: StoreCall) -> None:
        outcome: Tensor | FabricError
        if call.inner.error is not None:
            outcome = call.inner.error
        else:
            try:
                outcome = read(self._references, call.inner.payload(), call.rows)
                self.bytes_received += outcome.nbytes
            except FabricError as error:
                outcome = error
            self._stream.release(call.inner)
        self._settle(call, outcome)

    def _settle(self, call: StoreCall, outcome: Tensor | FabricError | None) -> None:
        published = call.settle(outcome)
        if published is not None:
            published.open_calls -= 1
            self._unpublish(published)

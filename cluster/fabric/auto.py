"""Stream for small layers, object store for large ones: one decision per layer, by the size of its hidden states.

A stream carries each group its own copy of the rows; the object store holds the hidden states once and every group
takes its rows from there, at a fixed price per call. So what is put once decides: the bytes of hidden [T, H]. A batch
that the store does not take goes by stream.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from cluster.errors import FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.transport import Batch, Call, Transport
from cluster.membership import Replica

log = logging.getLogger(__name__)


class AutoTransport:
    """Two transports over the same connections.

    threshold_bytes: hidden states of at least this size go through the store.
    """

    name = "auto"

    def __init__(self, stream: Transport, store: ObjectStoreTransport, threshold_bytes: int) -> None:
        self.parts = (stream, store)
        self._stream = stream
        self._store = store
        self._threshold_bytes = threshold_bytes

    @property
    def bytes_sent(self) -> int:
        """Of both."""
        return self._stream.bytes_sent + self._store.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Of both."""
        return self._stream.bytes_received + self._store.bytes_received

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        """See `Transport.prepare`; both use the stream's connections."""
        return self._stream.prepare(replica, patience_s)

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        """See `Transport.send`."""
        if batch.hidden.nbytes >= self._threshold_bytes:
            try:
                return self._store.send(replica, batch, deadline_s)
            except (ReplicaLostError, HandshakeError):
                raise
            except FabricError as error:
                log.warning("a batch goes by stream: %s", error)
        return self._stream.send(replica, batch, deadline_s)

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        """See `Transport.wait`; the store waits for calls of the stream as well."""
        return self._store.wait(calls, timeout_s)

    def forget(self, call: Call, *, watched: bool = False) -> None:
        """See `Transport.forget`."""
        self._store.forget(call, watched=watched)

    def retain(self, replica_ids: Collection[str]) -> None:
        """See `Transport.retain`."""
        self._stream.retain(replica_ids)

    def close(self) -> None:
        """See `Transport.close`."""
        self._store.close()


def transport_bytes(transport: Transport) -> dict[str, int]:
    """Bytes sent and received by name of transport; `auto` is shown as its two parts."""
    parts: tuple[Transport, ...] = transport.parts if isinstance(transport, AutoTransport) else (transport,)
    return {part.name: part.bytes_sent + part.bytes_received for part in parts}

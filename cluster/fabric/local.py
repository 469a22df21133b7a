"""Experts in this process: rows are computed when they are sent. The baseline of every transport, and their oracle.

Does the same packing and the same arithmetic as an expert replica; only the way there and back is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import FabricError, ReplicaLostError
from cluster.fabric.transport import Batch, Call
from cluster.membership import Replica

Compute = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, counts int64 [E], rows [R, H]) -> outputs [R, H]."""


@dataclass(frozen=True)
class LocalCall:
    """A call that was done when it was made."""

    sequence: int
    replica_id: str
    outputs: Tensor | None
    error: FabricError | None
    compute_s: float
    done: bool = True
    queue_rows: int = 0
    transport: str = "local"

    def result(self) -> Tensor:
        """The outputs [R, H]; raises `error` where the computation failed."""
        if self.outputs is None:
            raise self.error or FabricError("the call has no result")
        return self.outputs


class LocalTransport:
    """Computes for the groups it was given."""

    name = "local"

    def __init__(self, groups: Mapping[str, Compute]) -> None:
        """groups: name -> what computes its rows."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._groups = dict(groups)
        self._sequence = 0

    def prepare(self, replica: Replica, patience_s: float) -> bool:  # noqa: ARG002
        """There is nothing to connect to."""
        return True

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:  # noqa: ARG002
        """Compute the rows of `batch`. Whatever the experts raise becomes the call's error.

        Raises:
            ReplicaLostError: this process does not hold the group.
        """
        compute = self._groups.get(batch.group)
        if compute is None:
            raise ReplicaLostError(f"group {batch.group} is not in this process.")
        rows = batch.hidden.index_select(0, torch.from_numpy(batch.index))
        self._sequence += 1
        self.bytes_sent += rows.nbytes
        start_s = time.perf_counter()
        outputs: Tensor | None = None
        error: FabricError | None = None
        try:
            outputs = compute(batch.layer, torch.from_numpy(batch.counts), rows)
            self.bytes_received += outputs.nbytes
        except Exception as cause:
            error = FabricError(f"{type(cause).__name__}: {cause}")
        return LocalCall(self._sequence, replica.id, outputs, error, time.perf_counter() - start_s)

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:  # noqa: ARG002
        """All of them: they are done."""
        return list(calls)

    def forget(self, call: Call, *, watched: bool = False) -> None:
        """Nothing is kept here."""

    def retain(self, replica_ids: Collection[str]) -> None:
        """There are no connections."""

    def close(self) -> None:
        """There is nothing to close."""

"""The device behind one expert server: what waits, what runs as one batch, and when its results may leave.

All rows that wait for the same layer, from whichever router, run as one batch; the layer whose first rows have waited
longest goes first (continuous batching as in Orca, Yu et al. 2022, one level below). Knows no sockets: an `owner` is
whoever the outcome goes back to. Time is passed in, in seconds.

An emulated device answers no faster than one of `rows_per_s` would: the batch is computed at once, its outcomes are
held until the device would be done, and meanwhile new rows wait, so that queues and batches are as on such a device.
    due = max(arrival of the batch's first rows, end of the batch before) + rows / rows_per_s
Dimension letters: R rows, H hidden, E experts of the group in that layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cluster.errors import ReplicaLostError
from cluster.fabric.frames import Frame, Kind, Status
from cluster.fabric.transport import ReferenceCodec

Compute = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, counts int64 [E], rows [R, H] sorted by expert) -> [R, H] of the same dtype, unweighted; all on the CPU."""
Owner = TypeVar("Owner")


@dataclass(slots=True)
class Waiting(Generic[Owner]):
    """Rows that were received and not yet computed. `late_at`: when nobody wants them any more."""

    owner: Owner
    frame: Frame
    arrived: float
    late_at: float


@dataclass(slots=True)
class Outcome(Generic[Owner]):
    """What `owner` is told about `frame`: rows, or why not. compute_s: of the whole batch, as the device would take."""

    owner: Owner
    frame: Frame
    output: Tensor | None = None
    status: Status = Status.OK
    message: str = ""
    compute_s: float = 0.0


class Device(Generic[Owner]):
    """Queue and executor of one server, used by its thread alone; the counters may be read from others."""

    def __init__(self, compute: Compute, *, rows_per_s: float | None, references: ReferenceCodec | None) -> None:
        self.rows = self.batches = self.frames = self.queue_rows = 0
        self.busy_s = 0.0
        self._compute = compute
        self._rows_per_s = rows_per_s
        self._references = references
        # Insertion order is order of age: a layer enters with its first waiting rows and leaves with all of them.
        self._waiting: dict[int, list[Waiting[Owner]]] = {}
        self._held: list[Outcome[Owner]] = []
        self._free_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is held."""
        return not self._waiting and not self._held

    def wait_s(self, now: float) -> float | None:
        """Seconds until `step` has something to do; None while only new rows could change that."""
        if self._held:
            return max(0.0, self._free_at - now)
        return 0.0 if self._waiting else None

    def add(self, owner: Owner, frame: Frame, now: float) -> None:
        """Queue a ROWS or REFERENCE frame. Its deadline counts from `now`, as clocks of nodes differ."""
        entry = Waiting(owner, frame, now, now + frame.deadline_ms / 1000)
        self._waiting.setdefault(frame.layer, []).append(entry)
        self.queue_rows += frame.rows
        self.frames += 1

    def drop(self, owner: Owner) -> None:
        """`owner` is gone: compute nothing more for it."""
        for layer, entries in list(self._waiting.items()):
            left = [entry for entry in entries if entry.owner is not owner]
            self.queue_rows -= sum(e.frame.rows for e in entries) - sum(e.frame.rows for e in left)
            if left:
                self._waiting[layer] = left
            else:
                del self._waiting[layer]

    def step(self, now: float) -> list[Outcome[Owner]]:
        """Run one batch if the device is free; returns the outcomes that may leave now."""
        if self._held:
            if now < self._free_at:
                return []
            outcomes, self._held = self._held, []
            return outcomes
        if not self._waiting:
            return []
        layer = next(iter(self._waiting))
        entries = self._waiting.pop(layer)
        self.queue_rows -= sum(entry.frame.rows for entry in entries)
        refused, batch = self._load(entries, now)
        if not batch:
            return refused
        outcomes = self._run(layer, batch)
        if self._rows_per_s is not None:
            self._free_at = max(batch[0][0].arrived, self._free_at) + outcomes[0].compute_s
            self._held = outcomes
            return refused
        return refused + outcomes

    def _load(
        self, entries: Sequence[Waiting[Owner]], now: float
    ) -> tuple[list[Outcome[Owner]], list[tuple[Waiting[Owner], Tensor, Tensor]]]:
        """(outcomes of what cannot run, (entry, counts, rows) of what can)."""
        refused: list[Outcome[Owner]] = []
        batch = []
        for entry in entries:
            frame = entry.frame
            if now > entry.late_at:
                late = Outcome(entry.owner, frame, status=Status.LATE, message="the deadline passed in the queue.")
                refused.append(late)
                continue
            try:
                batch.append((entry, *self._rows_of(frame)))
            except Exception as error:
                status = Status.LOST if isinstance(error, ReplicaLostError) else Status.FAILED
                refused.append(Outcome(entry.owner, frame, status=status, message=sentence(error)))
        return refused, batch

    def _rows_of(self, frame: Frame) -> tuple[Tensor, Tensor]:
        counts, rows = frame.counts, frame.tensor
        if counts is None:
            raise ValueError("a batch without counts.")
        if frame.kind is Kind.REFERENCE:
            if self._references is None:
                raise ValueError("this replica takes no references.")
            rows = self._references.load(bytes(frame.data), counts)
            if rows.shape != (frame.rows, frame.hidden) or rows.dtype != frame.dtype:
                raise ValueError(f"the rows are not [{frame.rows}, {frame.hidden}] of {frame.dtype}.")
        if rows is None:
            raise ValueError("a batch without rows.")
        return counts, rows

    def _run(self, layer: int, batch: Sequence[tuple[Waiting[Owner], Tensor, Tensor]]) -> list[Outcome[Owner]]:
        counts, rows, order = merge([(counts, rows) for _, counts, rows in batch])
        start = time.perf_counter()
        try:
            output = self._compute(layer, counts, rows)
            if output.shape != rows.shape or output.dtype != rows.dtype:
                raise ValueError(f"the experts returned {tuple(output.shape)} for {tuple(rows.shape)} rows.")
        except Exception as error:
            message = sentence(error)
            outcomes = [Outcome(e.owner, e.frame, status=Status.FAILED, message=message) for e, _, _ in batch]
        else:
            parts = split(output.contiguous(), order, [part.shape[0] for _, _, part in batch])
            outcomes = [
                Outcome(entry.owner, entry.frame, part) for (entry, _, _), part in zip(batch, parts, strict=True)
            ]
        spent_s = time.perf_counter() - start if self._rows_per_s is None else rows.shape[0] / self._rows_per_s
        for outcome in outcomes:
            outcome.compute_s = spent_s
        self.rows += rows.shape[0]
        self.batches += 1
        self.busy_s += spent_s
        return outcomes


def merge(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """One batch from several (counts [E], rows [R_i, H]), sorted by expert again; rows of an expert keep their order.

    counts (1, 1) rows a b and counts (0, 2) rows c d -> counts (1, 3), rows a b c d.

    Returns (counts [E], rows [R, H], order [R]: merged row i is row order[i] of the concatenation); a single batch
    passes through uncopied with order None.
    """
    if len(batches) == 1:
        return *batches[0], None
    experts = torch.arange(batches[0][0].shape[0])
    order = torch.cat([experts.repeat_interleave(counts) for counts, _ in batches]).argsort(stable=True)
    rows = torch.cat([rows for _, rows in batches]).index_select(0, order)
    return torch.stack([counts for counts, _ in batches]).sum(0), rows, order


def split(output: Tensor, order: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Undo `merge`: the outputs [R_i, H] of each batch, contiguous; `sizes` are the R_i."""
    if order is None:
        return [output]
    return torch.split_with_sizes(torch.empty_like(output).index_copy_(0, order, output), list(sizes))


def sentence(error: Exception) -> str:
    """What a router is told about an exception."""
    return f"{type(error).__name__}: {error}"

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
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cluster.errors import FabricError, FrameError, ReplicaLostError
from cluster.fabric.frames import Frame, Status
from cluster.fabric.transport import ReferenceCodec
from cluster.metrics import BATCH_ROWS, LAYER_SECONDS
from cluster.tally import Tally

Compute = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, counts int64 [E], rows [R, H] sorted by expert) -> [R, H] of the same dtype, unweighted; all on the CPU."""
Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Job(Generic[Owner]):
    """Rows of one frame, from waiting to the outcome `owner` is told of.

    arrived, late_at: when they came, and when nobody wants them any more, in seconds. output: [R, H]; None where status
    and message say why not. compute_s: of the whole batch, as the device would take.
    """

    owner: Owner
    frame: Frame
    counts: Tensor
    arrived: float
    late_at: float
    rows: Tensor | None = None
    output: Tensor | None = None
    status: Status = Status.OK
    message: str = ""
    compute_s: float = 0.0


class Device(Generic[Owner]):
    """Queue and executor of one server, used by its thread alone; the counters may be read from others.

    batch_rows, batch_s: how many rows batches had, and how long they took.
    running_since: when the computation that runs now began, by `time.perf_counter`; None while there is none.
    """

    def __init__(self, compute: Compute, *, rows_per_s: float | None, references: ReferenceCodec | None) -> None:
        self.rows = self.batches = self.frames = self.queue_rows = 0
        self.busy_s = 0.0
        self.batch_rows, self.batch_s = Tally(BATCH_ROWS), Tally(LAYER_SECONDS)
        self.running_since: float | None = None
        self._compute = compute
        self._rows_per_s = rows_per_s
        self._references = references
        # Insertion order is order of age: a layer enters with its first waiting rows and leaves with all of them.
        self._waiting: dict[int, list[Job[Owner]]] = {}
        self._held: list[Job[Owner]] = []
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
        """Queue a ROWS or REFERENCE frame. Its deadline counts from `now`, as clocks of nodes differ.

        Raises:
            FrameError: it has no counts.
        """
        if frame.counts is None:
            raise FrameError(f"a {frame.kind.name} frame without counts.")
        job = Job(owner, frame, frame.counts, now, now + frame.deadline_ms / 1000, frame.tensor)
        self._waiting.setdefault(frame.layer, []).append(job)
        self.queue_rows += frame.rows
        self.frames += 1

    def drop(self, owner: Owner) -> None:
        """`owner` is gone: compute nothing more for it."""
        for layer, jobs in list(self._waiting.items()):
            left = [job for job in jobs if job.owner is not owner]
            self.queue_rows -= _rows_of(jobs) - _rows_of(left)
            if left:
                self._waiting[layer] = left
            else:
                del self._waiting[layer]

    def step(self, now: float) -> list[Job[Owner]]:
        """Run one batch if the device is free; returns the jobs whose outcomes may leave now."""
        if self._held:
            if now < self._free_at:
                return []
            done, self._held = self._held, []
            return done
        if not self._waiting:
            return []
        layer, jobs = next(iter(self._waiting.items()))
        del self._waiting[layer]
        self.queue_rows -= _rows_of(jobs)
        batch = [job for job in jobs if (job.rows is not None and now <= job.late_at) or self._load(job, now)]
        if batch:
            self._run(layer, batch)
            if self._rows_per_s is not None:
                self._free_at = max(batch[0].arrived, self._free_at) + batch[0].compute_s
                self._held = batch
                return [job for job in jobs if job not in batch]
        return jobs

    def _load(self, job: Job[Owner], now: float) -> bool:
        """Give the job its rows; False where it cannot run, with the reason in the job."""
        frame = job.frame
        if now > job.late_at:
            job.status, job.message = Status.LATE, "the deadline passed in the queue."
        elif job.rows is None:
            try:
                job.rows = self._load_reference(frame, job.counts)
            except Exception as error:
                job.status = Status.LOST if isinstance(error, ReplicaLostError) else Status.FAILED
                job.message = sentence(error)
        return job.status is Status.OK

    def _load_reference(self, frame: Frame, counts: Tensor) -> Tensor:
        if self._references is None:
            raise FabricError("this replica takes no references.")
        rows = self._references.load(bytes(frame.data), counts)
        if rows.shape != (frame.rows, frame.hidden) or rows.dtype != frame.dtype:
            raise FabricError(f"the rows are not [{frame.rows}, {frame.hidden}] of {frame.dtype}.")
        return rows

    def _run(self, layer: int, batch: Sequence[Job[Owner]]) -> None:
        """Compute the batch and give each of its jobs its output, or the reason why there is none."""
        counts, rows, order = merge([(job.counts, job.rows) for job in batch if job.rows is not None])
        start = self.running_since = time.perf_counter()
        try:
            output = self._compute(layer, counts, rows)
            if output.shape != rows.shape or output.dtype is not rows.dtype:
                raise ValueError(f"the experts returned {tuple(output.shape)} for {tuple(rows.shape)} rows.")
            if order is None:
                batch[0].output = output.contiguous()
            else:
                parts = split(output.contiguous(), order, [job.frame.rows for job in batch])
                for job, part in zip(batch, parts, strict=True):
                    job.output = part
        except Exception as error:
            message = sentence(error)
            for job in batch:
                job.status, job.message = Status.FAILED, message
        finally:
            self.running_since = None
        n_rows = _rows_of(batch)
        spent_s = time.perf_counter() - start if self._rows_per_s is None else n_rows / self._rows_per_s
        for job in batch:
            job.compute_s = spent_s
        self.rows += n_rows
        self.batches += 1
        self.busy_s += spent_s
        self.batch_rows.add(n_rows)
        self.batch_s.add(spent_s)


def _rows_of(jobs: Sequence[Job[Any]]) -> int:
    return jobs[0].frame.rows if len(jobs) == 1 else sum(job.frame.rows for job in jobs)


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


def split(output: Tensor, order: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Undo `merge` of several: the outputs [R_i, H] of each batch, contiguous; `sizes` are the R_i."""
    return torch.split_with_sizes(torch.empty_like(output).index_copy_(0, order, output), list(sizes))


def sentence(error: Exception) -> str:
    """What a router is told about an exception."""
    return f"{type(error).__name__}: {error}"

"""The expert side of the stream: one thread serves all routers and computes in between.

The loop: read what has arrived on every ready connection (`connections`), run one batch (`device`), reply without
blocking, repeat. With one router this computes in the thread that received: a thread hop costs more than a small FFN.
Knows no weights (the `compute` it is given does), no Directory (the caller deregisters before `drain`) and no Ray.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from cluster.errors import ConfigError, FrameError
from cluster.fabric.connections import Connection, Connections, ServerLimits
from cluster.fabric.device import Compute, Device, Job, sentence
from cluster.fabric.frames import Buffer, Frame, Kind, Status, encode
from cluster.fabric.handshake import Identity
from cluster.fabric.sockets import listen_tcp, listen_unix, unlink
from cluster.fabric.transport import ReferenceCodec

log = logging.getLogger(__name__)
OnDone = Callable[[Sequence[Job[Any]], float], None]
"""Told of jobs that were just answered, those of one batch at once, and when it was done, by `time.monotonic`."""
_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class ServedGroup:
    """What a server serves. hidden: layer -> width of its rows; experts: layer -> how many experts the group holds."""

    name: str
    replica_id: str
    dtype: torch.dtype
    hidden: Mapping[int, int]
    experts: Mapping[int, int]


@dataclass(frozen=True)
class ServerStats:
    """Totals since the start (rows, batches, frames, busy_s) and levels now (queue_rows, connections, references).

    batch_rows, batch_s: how many batches had so many rows, and took so long; buckets as in `cluster.metrics`.
    """

    rows: int
    batches: int
    frames: int
    busy_s: float
    queue_rows: int
    connections: int
    references: int
    batch_rows: tuple[int, ...] = ()
    batch_s: tuple[int, ...] = ()


class ExpertServer:
    """Serves the experts of one group to any number of routers.

    compute: see `device.Compute`; called in the server's thread under `torch.inference_mode`. If it raises, the frames
    of that batch are answered with the error and the server goes on.
    digest: the model digest, 32 bytes. key: the cluster key.
    unix_path: a socket file in a directory of mode 0700. host: where to listen for other nodes. At least one of them.
    emulate_rows_per_s: see `device`. references: for transports whose rows do not travel in frames.
    on_done: called in the server's thread; must be quick, must not raise, and must not keep the jobs.

    Raises:
        ConfigError: from `start`, when it cannot listen.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        shape: ServedGroup,
        digest: bytes,
        key: bytes,
        unix_path: str | None = None,
        host: str | None = None,
        emulate_rows_per_s: float | None = None,
        references: ReferenceCodec | None = None,
        limits: ServerLimits | None = None,
        on_done: OnDone | None = None,
    ) -> None:
        self._shape = shape
        self._expected = {
            layer: (experts, shape.hidden[layer], shape.dtype) for layer, experts in shape.experts.items()
        }
        self._unix_path = unix_path
        self._unix_bound = False
        self._host = host
        self._port = 0
        self._references = references
        self._on_done = on_done
        self._limits = limits or ServerLimits()
        identity = Identity(digest, shape.name, shape.replica_id)
        self._connections = Connections(key, identity, self._limits, self._on_frame, self._on_gone)
        self._device: Device[Connection] = Device(compute, rows_per_s=emulate_rows_per_s, references=references)
        self._held_references = 0
        self._stopping = self._drain_asked = False
        self._drained = threading.Event()
        self._waker, self._waken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"fabric-{shape.replica_id}", daemon=True)

    def start(self) -> None:
        """Listen, and serve in a thread of its own."""
        if self._unix_path is None and self._host is None:
            raise ConfigError("an expert server needs a Unix socket path or a host to listen on.")
        if self._unix_path is not None:
            self._connections.listen(listen_unix(self._unix_path))
            self._unix_bound = True
        if self._host is not None:
            listener = listen_tcp(self._host)
            self._port = listener.getsockname()[1]
            self._connections.listen(listener)
        self._waken.setblocking(False)
        self._connections.watch(self._waken)
        self._thread.start()

    @property
    def address(self) -> tuple[str, str, int]:
        """(Unix path or "", host or "", TCP port or 0), as `membership.Address` takes them."""
        return self._unix_path or "", self._host or "", self._port

    @property
    def alive(self) -> bool:
        """Whether the serving thread runs; for health checks."""
        return self._thread.is_alive()

    def stuck_s(self) -> float:
        """Seconds that the present computation has been running, 0 when there is none; may be called from any thread.

        For health checks: the serving thread computes, so a computation that does not end answers nobody any more.
        """
        since = self._device.running_since  # read once: it may end meanwhile
        return 0.0 if since is None else max(0.0, time.perf_counter() - since)

    def stats(self) -> ServerStats:
        """Counters now; may be called from any thread."""
        device = self._device
        return ServerStats(
            rows=device.rows,
            batches=device.batches,
            frames=device.frames,
            busy_s=device.busy_s,
            queue_rows=device.queue_rows,
            connections=len(self._connections.routers),
            references=self._held_references,
            batch_rows=tuple(device.batch_rows.counts),
            batch_s=tuple(device.batch_s.counts),
        )

    def drain(self, timeout_s: float) -> bool:
        """Stop accepting, tell routers to send elsewhere, finish and flush what is here; call `close` afterwards.

        Rows already on their way are still served. Returns whether everything was finished within `timeout_s`.
        """
        if not self.alive:
            return True
        self._drain_asked = True
        self._wake()
        return self._drained.wait(timeout_s)

    def close(self) -> None:
        """Stop at once: open calls of routers end with their connections. Idempotent."""
        self._stopping = True
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if self._thread.ident is None:
            self._clean_up()

    def _wake(self) -> None:
        with suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                device, connections = self._device, self._connections
                while not self._stopping:
                    now = connections.poll(None if device.idle else device.wait_s(time.monotonic()))
                    self._work(now)
                    if self._drain_asked:
                        self._drain()
        except Exception:
            log.exception("the expert server stops")
        finally:
            self._clean_up()

    def _work(self, now: float) -> None:
        # Not in `_run`, which lasts: it would hold the last job, and with it the memory of a router that is gone.
        jobs = self._device.step(now)
        done_s = now if self._on_done is None else time.monotonic()
        for job in jobs:
            self._reply(job)
        if jobs and self._on_done is not None:  # nobody waits for this
            self._on_done(jobs, done_s)

    def _drain(self) -> None:
        if not self._connections.draining:
            self._connections.drain()
        if self._device.idle and self._connections.flushed:
            self._drained.set()

    def _clean_up(self) -> None:
        self._connections.close_all()
        # A path that could not be bound may belong to somebody else.
        if self._unix_bound and self._unix_path is not None:
            unlink(self._unix_path)
        self._waker.close()
        self._waken.close()
        self._drained.set()

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        if frame.kind is Kind.ROWS or frame.kind is Kind.REFERENCE:
            self._check(frame)
            connection.waiting_bytes += frame.payload_bytes
            self._device.add(connection, frame, time.monotonic())
            if connection.waiting_bytes > self._limits.waiting_bytes:
                self._connections.update_events(connection)
        elif frame.kind is Kind.RELEASE:
            self._release(connection, frame.sequence)
        elif frame.kind is Kind.PING:
            self._connections.send(connection, encode(Kind.PONG, frame.sequence, digest8=self._connections.digest8))
        else:
            raise FrameError(f"a {frame.kind.name} frame is not expected from a router.")

    def _check(self, frame: Frame) -> None:
        """The frame's shape against the group's."""
        expected = self._expected.get(frame.layer)
        if (frame.n_counts, frame.hidden, frame.dtype) == expected:
            return
        if expected is None:
            raise FrameError(f"{self._shape.name} holds no experts in layer {frame.layer}.")
        raise FrameError(
            f"layer {frame.layer} of {self._shape.name} takes {expected[0]} counts and rows of {expected[1]} x "
            f"{expected[2]}, not {frame.n_counts} and {frame.hidden} x {frame.dtype}."
        )

    def _reply(self, job: Job[Connection]) -> None:
        connection, frame = job.owner, job.frame
        if not connection.open:
            return
        connection.waiting_bytes -= frame.payload_bytes
        if frame.mailed:
            if job.output is not None:
                compute_us = int(job.compute_s * 1e6)
                self._connections.answer(connection, frame, job.output, self._device.queue_rows, compute_us)
                return
            connection.mailed = False
        self._connections.send(connection, self._answer(connection, job))

    def _answer(self, connection: Connection, job: Job[Connection]) -> list[Buffer]:
        frame, output = job.frame, job.output
        queue_rows, compute_us = self._device.queue_rows, int(job.compute_s * 1e6)
        digest8 = self._connections.digest8
        if output is not None and frame.kind is Kind.ROWS:
            return encode(
                Kind.RESULT, frame.sequence, digest8=digest8, queue_rows=queue_rows, compute_us=compute_us, body=output
            )
        if output is not None:
            try:
                return encode(
                    Kind.REFERENCE,
                    frame.sequence,
                    digest8=digest8,
                    rows=frame.rows,
                    hidden=frame.hidden,
                    dtype=frame.dtype,
                    queue_rows=queue_rows,
                    compute_us=compute_us,
                    body=self._store(connection, frame.sequence, output),
                )
            except Exception as error:
                # Into the job as well: whoever is told of it shall not take it for answered.
                job.status, job.message = Status.FAILED, sentence(error)
                log.warning("a result of layer %d could not be stored: %s", frame.layer, job.message)
        body = job.message.encode()[:_MESSAGE_BYTES]
        return encode(Kind.ERROR, frame.sequence, digest8=digest8, status=job.status, queue_rows=queue_rows, body=body)

    def _store(self, connection: Connection, sequence: int, rows: torch.Tensor) -> bytes:
        """Publish a result and hold it until the router releases it."""
        if self._references is None:
            raise FrameError("this replica takes no references.")
        if len(connection.references) >= self._limits.references:
            raise FrameError(f"{len(connection.references)} results are unreleased.")
        token, payload = self._references.store(rows)
        self._release(connection, sequence)
        connection.references[sequence] = token
        self._held_references += 1
        return payload

    def _release(self, connection: Connection, sequence: int) -> None:
        if sequence not in connection.references or self._references is None:
            return
        self._held_references -= 1
        try:
            self._references.release(connection.references.pop(sequence))
        except Exception:
            log.exception("a result could not be released")

    def _on_gone(self, connection: Connection) -> None:
        self._device.drop(connection)
        for sequence in list(connection.references):
            self._release(connection, sequence)

"""Processes that serve expert groups without experts: the real server around a compute that returns its rows.

So everything is measured but the FFN. Each process also holds the floor's echo, on a socket of its own. Started by
`spawn`, with torch and without transformers or Ray; `EchoGroup` is what runs inside and may run in a Ray actor too.
Dimension letters: E experts, H hidden, R rows.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.server import ExpertServer, ServedGroup
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import ReferenceCodec, Transport
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous
from infra.bench.floor import Echo

GROUPS, EXPERTS = 4, 16
WIDTHS = (256, 2048)
"""H of the layers served: layer i has rows of WIDTHS[i]."""
PLACEMENT = contiguous(dict.fromkeys(range(len(WIDTHS)), EXPERTS), GROUPS)
KEY, DIGEST, NODE = b"benchmark cluster key, no secret", bytes(32), "here"
WAIT_S = 60.0
# A device so fast that no batch is ever worth splitting; with one replica a group it would not be anyway.
_SPEED_ROWS_PER_S = 1e9


class EchoGroup:
    """One group at work in this process until `close`."""

    def __init__(self, group: int, *, references: ReferenceCodec | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="xs-")
        held = {layer: len(experts) for layer, experts in PLACEMENT.groups[group].items()}
        self.server = ExpertServer(
            _return_rows,
            shape=ServedGroup(f"experts-{group}", f"replica-{group}", torch.float32, dict(enumerate(WIDTHS)), held),
            digest=DIGEST,
            key=KEY,
            unix_path=os.path.join(self._folder.name, "s"),
            references=references,
        )
        self.server.start()
        address = Address(NODE, *self.server.address)
        self.replica = Replica(
            f"replica-{group}",
            f"experts-{group}",
            "default",
            address,
            DIGEST.hex(),
            _SPEED_ROWS_PER_S,
            State.READY,
        )

    @property
    def floor_path(self) -> str:
        """Where an `Echo` of this process may listen."""
        return os.path.join(self._folder.name, "f")

    def close(self) -> None:
        """Stop serving."""
        self.server.close()
        self._folder.cleanup()


class ExpertProcesses:
    """One process per group. view: of their replicas. floor_paths: where their echoes listen, by group."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        with ExitStack() as stack:
            stack.callback(self._stop)
            for group in range(GROUPS):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, group), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
            started = [_answer(pipe) for _, pipe in self._workers]
            self.view = view_of([replica for replica, _ in started])
            self.floor_paths = [path for _, path in started]
            stack.pop_all()

    def __enter__(self) -> ExpertProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(WAIT_S)
            if process.is_alive():
                process.kill()
                process.join()


def view_of(replicas: list[Replica]) -> View:
    """The view a directory would give of them."""
    return View(Epoch("bench", 1), tuple(replicas))


def new_stream() -> StreamTransport:
    """A stream transport that knows the key."""
    return StreamTransport(key=KEY, digest=DIGEST, node_id=NODE)


def new_dispatcher(transport: Transport, view: View) -> Dispatcher:
    """A dispatcher that knows `view`."""
    dispatcher = Dispatcher(PLACEMENT, transport, wait_s=WAIT_S, timeout_s=WAIT_S)
    dispatcher.update(view)
    return dispatcher


def _return_rows(layer: int, counts: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG001
    """The FFN that costs nothing."""
    return rows


def _work(pipe: Connection, group: int) -> None:
    """What a process does: say where it listens, serve until the pipe closes."""
    try:
        served = EchoGroup(group)
        Echo(served.floor_path)
        pipe.send((served.replica, served.floor_path))
    except Exception:
        pipe.send(traceback.format_exc())
        return
    try:
        pipe.recv()
    except EOFError:
        served.close()


def _answer(pipe: Connection) -> tuple[Replica, str]:
    if not pipe.poll(WAIT_S):
        raise TimeoutError("an expert process does not answer")
    answer = pipe.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    replica, path = answer
    return replica, path

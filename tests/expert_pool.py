"""Expert replicas in processes of their own, without Ray: one pool serves one checkpoint after the other.

Each process holds one `ExpertReplica` at a time. Starting a process costs seconds of imports, so tests share the pool.
"""

from __future__ import annotations

import multiprocessing
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from cluster.blueprint import Blueprint
from cluster.config import ExpertsSpec
from cluster.membership import Epoch, Replica, View

KEY = b"a cluster key for tests only"
NODE = "this-machine"
START_S = 60.0


@dataclass(frozen=True)
class Started:
    """What a process says of the replica it serves."""

    record: Replica
    parameter_bytes: int
    imported_transformers: bool


class ExpertPool:
    """`size` processes, each good for one replica at a time."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def __enter__(self) -> ExpertPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.join(START_S)
            if process.is_alive():
                process.kill()
                process.join()

    def serve(self, blueprint: Blueprint, spec: ExpertsSpec, **options: Any) -> list[Started]:
        """Replace what the processes serve: process i gets group i modulo the number of groups."""
        for number, (_, pipe) in enumerate(self._workers):
            pipe.send((blueprint, spec, number % spec.groups, f"replica-{number}", options))
        return [self._answer(pipe) for _, pipe in self._workers]

    def drain(self, number: int) -> None:
        """Make one replica say GOAWAY, finish what it has, and stop."""
        self._workers[number][1].send("drain")

    def kill(self, number: int) -> None:
        """End one process at once, in the middle of whatever it does. The pool cannot `serve` any more."""
        process, _ = self._workers[number]
        process.kill()
        process.join()

    def _answer(self, pipe: Connection) -> Started:
        if not pipe.poll(START_S):
            raise TimeoutError("an expert process does not answer")
        answer = pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def view_of(started: list[Started], n: int = 1) -> View:
    """The view a directory would give of these replicas."""
    return View(Epoch("test", n), tuple(each.record for each in started))


def _work(pipe: Connection) -> None:
    import sys

    import torch

    from deployments.experts.replica import ExpertReplica

    torch.set_num_threads(1)
    replica: ExpertReplica | None = None
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            break
        try:
            if order == "drain":
                replica.drain(START_S)
                replica.close()
                continue
            blueprint, spec, index, replica_id, options = order
            if replica is not None:
                replica.close()
            replica = ExpertReplica(blueprint, spec, index, replica_id=replica_id, key=KEY, node=NODE, **options)
            pipe.send(Started(replica.record(), replica.weights.parameter_bytes, "transformers" in sys.modules))
        except Exception:
            pipe.send(traceback.format_exc())
    if replica is not None:
        replica.close()

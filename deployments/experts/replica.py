"""One copy of an expert group at work: weights in memory, speed measured, server answering. Without Ray.

Knows no Serve and no directory; `deployment.py` wraps it for Serve, tests and benchmarks run it in plain processes.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cluster.blueprint import Blueprint
from cluster.config import ExpertsSpec
from cluster.fabric.server import ExpertServer, ServedGroup
from cluster.fabric.staging import staging_for
from cluster.fabric.transport import ReferenceCodec
from cluster.membership import Address, Replica, State
from cluster.threads import require_one_thread
from deployments.experts.ffn import expert_ffn
from deployments.experts.tracing import FfnSpans
from deployments.experts.weights import GroupWeights, ProgressBar, load_group

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

WARM_UP_ROWS = 64
MEASURE_S = 0.05


class ExpertReplica:
    """Loads one group of `blueprint` and serves it until `close`.

    replica_id: never used twice. node: name of the machine, the same for everything that can share Unix sockets.
    references: how rows come by the object store, where that is possible. tracer: None where traces are off.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        spec: ExpertsSpec,
        index: int,
        *,
        replica_id: str,
        key: bytes,
        node: str,
        pool: str = "default",
        emulate_rows_per_s: float | None = None,
        device: str = "cpu",
        host: str | None = "127.0.0.1",
        batch_invariant: bool = False,
        references: ReferenceCodec | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.group = spec.group_names[index]
        self._device = torch.device(device)
        self._staging = staging_for(self._device)
        self._batch_invariant = batch_invariant
        if batch_invariant:
            require_one_thread(self._device)
        dtype: torch.dtype = getattr(torch, blueprint.plan.dtype)
        self.weights: GroupWeights = load_group(
            blueprint.plan,
            Path(blueprint.model_path),
            blueprint.placement.groups[index],
            dtype=dtype,
            device=self._device,
            progress=ProgressBar(f"{self.group}: loading experts"),
        )
        self.speed_rows_per_s = emulate_rows_per_s or self._measure_speed()
        # A socket file of its own in a folder only this user can enter; short, because the kernel allows 108 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="xs-")
        self.server = ExpertServer(
            self.compute,
            shape=ServedGroup(
                name=self.group,
                replica_id=replica_id,
                dtype=dtype,
                hidden={layer: held.hidden for layer, held in self.weights.layers.items()},
                experts={layer: len(held.expert_ids) for layer, held in self.weights.layers.items()},
            ),
            digest=blueprint.digest,
            key=key,
            unix_path=os.path.join(self._folder.name, "s"),
            host=host,
            emulate_rows_per_s=emulate_rows_per_s,
            references=references,
            on_done=_spans(tracer, self.group, replica_id, emulated=emulate_rows_per_s is not None),
        )
        self.server.start()
        self._record = Replica(
            id=replica_id,
            group=self.group,
            pool=pool,
            address=_address(node, self.server),
            digest=blueprint.digest.hex(),
            speed_rows_per_s=self.speed_rows_per_s,
        )

    def record(self, state: State = State.READY) -> Replica:
        """What the directory is told about this replica."""
        return Replica(**{**vars(self._record), "state": state})

    def compute(self, layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        """The experts of `layer` on rows [R, H] sorted by expert; counts: int64 [E], rows of each. Unweighted.

        Rows and results are on the CPU, in the same dtype.
        """
        rows = self._staging.arrive(rows)
        output = expert_ffn(self.weights.layers[layer], rows, counts, batch_invariant=self._batch_invariant)
        return self._staging.leave(output)[0]

    def drain(self, timeout_s: float) -> None:
        """Tell routers to go elsewhere, finish what has arrived, flush. Idempotent."""
        self.server.drain(timeout_s)

    def close(self) -> None:
        """Stop serving and remove the socket. Idempotent."""
        self.server.close()
        self._folder.cleanup()

    def _measure_speed(self) -> float:
        """Rows of one layer per second, after a warm-up that also faults the weights in."""
        self._compute_every_layer()
        rows_done, started = 0, time.perf_counter()
        while True:
            rows_done += self._compute_every_layer()
            elapsed = time.perf_counter() - started
            if elapsed > MEASURE_S:
                return rows_done / elapsed

    def _compute_every_layer(self) -> int:
        """Some rows for every expert; returns how many."""
        rows_done = 0
        for layer, held in self.weights.layers.items():
            counts = torch.full((len(held.expert_ids),), WARM_UP_ROWS // len(held.expert_ids) + 1)
            rows = torch.zeros(int(counts.sum()), held.hidden, dtype=held.dtype)
            self.compute(layer, counts, rows)
            rows_done += len(rows)
        return rows_done


def _spans(tracer: Tracer | None, group: str, replica_id: str, *, emulated: bool) -> FfnSpans | None:
    return None if tracer is None else FfnSpans(tracer, group=group, replica_id=replica_id, emulated=emulated)


def _address(node: str, server: ExpertServer) -> Address:
    unix_path, host, port = server.address
    return Address(node=node, unix_path=unix_path or "", host=host or "", port=port or 0)

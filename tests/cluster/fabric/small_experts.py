"""Two groups of small experts, served in this process over a Unix socket, and a store of arrays without Ray."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import ReplicaLostError
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.server import ExpertServer, OnDone, ServedGroup
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import ReferenceCodec, Transport
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous

EXPERTS, PER_TOKEN, HIDDEN, INNER, LAYER, GROUPS = 8, 2, 32, 24, 1, 2
KEY, DIGEST, NODE = b"k" * 32, b"d" * 32, "node"
PLACEMENT = contiguous({LAYER: EXPERTS}, GROUPS)
Compute = Callable[[int, Tensor, Tensor], Tensor]


def expert_group(group: int, dtype: torch.dtype) -> Compute:
    """The FFN of the experts of `group`, one after the other: down(silu(up(x)))."""
    generator = torch.Generator().manual_seed(7)
    up = torch.randn(EXPERTS, INNER, HIDDEN, generator=generator).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator).to(dtype)
    experts = PLACEMENT.groups[group][LAYER]

    def compute(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        assert layer == LAYER
        parts = rows.split(counts.tolist())
        outputs = [
            torch.nn.functional.silu(part @ up[expert].T) @ down[expert].T
            for expert, part in zip(experts, parts, strict=True)
        ]
        return torch.cat(outputs)

    return compute


def server(
    directory: Path,
    group: int,
    *,
    dtype: torch.dtype,
    compute: Compute,
    references: ReferenceCodec | None,
    on_done: OnDone | None = None,
) -> ExpertServer:
    """A server of one group, not started. `directory` is made private, and its path must be short."""
    directory.chmod(0o700)
    return ExpertServer(
        compute,
        shape=ServedGroup(
            f"experts-{group}", f"r{group}", dtype, {LAYER: HIDDEN}, {LAYER: len(PLACEMENT.groups[group][LAYER])}
        ),
        digest=DIGEST,
        key=KEY,
        unix_path=str(directory / f"{group}.sock"),
        references=references,
        on_done=on_done,
    )


def replica(group: int, unix_path: str) -> Replica:
    """What the directory would say of the server of `group`."""
    address = Address(NODE, unix_path, "127.0.0.1", 1)
    return Replica(f"r{group}", f"experts-{group}", "default", address, DIGEST.hex(), 1e6, State.READY)


@contextmanager
def serving(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    references: ReferenceCodec | None = None,
    on_done: Callable[[int], OnDone] | None = None,
) -> Iterator[tuple[View, list[ExpertServer]]]:
    """Both groups served in this process: the view of them and their servers. on_done: makes that of each group."""
    with ExitStack() as stack:
        servers, replicas = [], []
        for group in range(GROUPS):
            served = server(
                directory,
                group,
                dtype=dtype,
                compute=expert_group(group, dtype),
                references=references,
                on_done=None if on_done is None else on_done(group),
            )
            served.start()
            stack.callback(served.close)
            servers.append(served)
            replicas.append(replica(group, served.address[0]))
        yield View(Epoch("i", 1), tuple(replicas)), servers


def new_stream() -> StreamTransport:
    """A stream transport that knows the key."""
    return StreamTransport(key=KEY, digest=DIGEST, node_id=NODE)


def dispatcher(transport: Transport, view: View) -> Dispatcher:
    """A dispatcher that knows `view`."""
    made = Dispatcher(PLACEMENT, transport, wait_s=5, timeout_s=5)
    made.update(view)
    return made


def layer_input(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], index [T, K], weight [T, K])."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.rand(tokens, EXPERTS, generator=generator).topk(PER_TOKEN).indices
    return hidden, index, torch.rand(tokens, PER_TOKEN, generator=generator)


_NUMBERS = itertools.count()


class Held:
    """What `MemoryReferences.put` gives: the array is in the store as long as this lives."""


class MemoryReferences:
    """A store of arrays in this process: `len` is the number of arrays that are held."""

    def __init__(self) -> None:
        self.arrays: dict[bytes, npt.NDArray[Any]] = {}
        self.puts = 0

    def __len__(self) -> int:
        return len(self.arrays)

    def put(self, array: npt.NDArray[Any]) -> tuple[object, bytes]:
        self.puts += 1
        name = f"object {next(_NUMBERS):09}".encode()
        copy = array.copy()
        copy.flags.writeable = False
        self.arrays[name] = copy
        held = Held()
        weakref.finalize(held, self.arrays.pop, name, None)
        return held, name

    @contextmanager
    def get(self, name: bytes, timeout_s: float) -> Iterator[npt.NDArray[Any]]:
        assert timeout_s > 0
        if name not in self.arrays:
            raise ReplicaLostError("an object of the store is lost.")
        yield self.arrays[name]

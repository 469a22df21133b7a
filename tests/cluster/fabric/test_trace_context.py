"""The trace context of a batch reaches the replica by every way there is (1 s)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cluster.fabric.device import Job
from cluster.fabric.frames import TRACE_BYTES
from cluster.fabric.mailbox import SUPPORTED
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.store_codec import StoreCodec
from tests.cluster.fabric.serving import NODE, WAIT_S, batch, expected, finished, serving, transport, until
from tests.cluster.fabric.small_experts import MemoryReferences

TRACES = [bytes([number]) * TRACE_BYTES for number in (1, 2)]


@dataclass
class Done:
    """An `on_done`: the contexts of what was answered."""

    traces: list[bytes] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job[Any]], done_s: float) -> None:
        self.traces += [job.frame.trace for job in jobs]
        assert all(done_s >= job.arrived for job in jobs)


@pytest.mark.parametrize("node", [NODE, "another-node"])
def test_by_mailbox_and_by_socket(node: str) -> None:
    """The same shape again and again: what a mailbox remembers of one batch is not said of the next."""
    done, traces = Done(), [TRACES[0], b"", TRACES[1], b"", TRACES[0]]
    with serving(tcp=True, on_done=done) as (_, replica), transport(node_id=node) as stream:
        for trace in traces:
            sent = batch()
            sent.trace = trace
            call = stream.send(replica, sent, WAIT_S)
            finished(stream, [call])
            assert torch.equal(call.result(), expected(sent))
        assert bool(stream._links[replica.id].mailed_bytes) == (node == NODE and SUPPORTED)
        until(lambda: done.traces == traces)


def test_by_the_object_store() -> None:
    store, done = MemoryReferences(), Done()
    with serving(references=StoreCodec(store), on_done=done) as (_, replica), transport() as stream:
        through = ObjectStoreTransport(stream, store)
        for trace in (TRACES[0], b""):
            sent = batch()
            sent.trace = trace
            call = through.send(replica, sent, WAIT_S)
            assert call.transport == "object_store"
            while not call.done:
                through.wait([call], WAIT_S)
            assert torch.equal(call.result(), expected(sent))
        until(lambda: done.traces == [TRACES[0], b""])

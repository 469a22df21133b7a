"""Which transport `auto` takes, and that it makes no difference to the result (about 1 s)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch

from cluster.errors import FabricError
from cluster.fabric.auto import AutoTransport, transport_bytes
from cluster.fabric.local import LocalTransport
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.store_codec import StoreCodec
from cluster.membership import View
from tests.cluster.fabric import small_experts as small

TOKEN_BYTES = small.HIDDEN * 4


@pytest.fixture
def store() -> small.MemoryReferences:
    return small.MemoryReferences()


@pytest.fixture
def view(tmp_path: Path, store: small.MemoryReferences) -> Iterator[View]:
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, _):
        yield view


def auto(store: small.MemoryReferences, threshold_bytes: int) -> AutoTransport:
    stream = small.new_stream()
    return AutoTransport(stream, ObjectStoreTransport(stream, store), threshold_bytes)


def test_layers_from_the_threshold_on_go_through_the_store_and_smaller_ones_by_stream(
    view: View, store: small.MemoryReferences
) -> None:
    transport = auto(store, 10 * TOKEN_BYTES)
    dispatcher = small.dispatcher(transport, view)
    dispatcher.scatter_gather(small.LAYER, *small.layer_input(9, torch.float32))
    before = dispatcher.stats().transport_bytes
    assert store.puts == before["object_store"] == 0
    assert before["stream"] > 2 * 9 * small.PER_TOKEN * TOKEN_BYTES
    dispatcher.scatter_gather(small.LAYER, *small.layer_input(10, torch.float32))
    after = dispatcher.stats().transport_bytes
    assert store.puts == 1 + small.GROUPS
    assert after["object_store"] == 10 * TOKEN_BYTES + 10 * small.PER_TOKEN * TOKEN_BYTES
    assert transport.bytes_sent + transport.bytes_received == sum(after.values())
    transport.close()


def test_large_and_small_layers_give_the_same_bits_as_local_experts(view: View, store: small.MemoryReferences) -> None:
    transport = auto(store, 10 * TOKEN_BYTES)
    dispatcher = small.dispatcher(transport, view)
    groups = {f"experts-{group}": small.expert_group(group, torch.float32) for group in range(small.GROUPS)}
    oracle = small.dispatcher(LocalTransport(groups), view)
    for tokens in (1, 9, 10, 64):
        layer = small.layer_input(tokens, torch.float32, seed=tokens)
        assert torch.equal(dispatcher.scatter_gather(small.LAYER, *layer), oracle.scatter_gather(small.LAYER, *layer))
    transport.close()


def test_a_store_that_is_full_sends_the_batch_by_stream(view: View) -> None:
    class Full(small.MemoryReferences):
        def put(self, array: npt.NDArray[Any]) -> tuple[object, bytes]:
            raise FabricError(f"the object store took no {array.nbytes} bytes")

    transport = auto(Full(), 1)
    dispatcher = small.dispatcher(transport, view)
    dispatcher.scatter_gather(small.LAYER, *small.layer_input(9, torch.float32))
    assert transport_bytes(transport)["object_store"] == 0
    assert dispatcher.stats().resends == 0
    transport.close()

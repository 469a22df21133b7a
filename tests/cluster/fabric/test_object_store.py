"""The object-store transport over real connections and a store in this process; Ray's is in test_ray_references.

About 4 s.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FabricError, FrameError, ReplicaLostError
from cluster.fabric.local import LocalTransport
from cluster.fabric.object_store import ObjectStoreTransport
from cluster.fabric.store_codec import StoreCodec, publish, read, request
from cluster.fabric.transport import Batch
from tests.cluster.fabric import small_experts as small


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the other thread has come so far."""
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


class ForgetfulReferences(small.MemoryReferences):
    """Loses the next `lose` objects that are read."""

    lose = 0

    @contextmanager
    def get(self, name: bytes, timeout_s: float) -> Iterator[npt.NDArray[Any]]:
        if self.lose:
            self.lose -= 1
            raise ReplicaLostError("an object of the store is lost.")
        with super().get(name, timeout_s) as array:
            yield array


def batch(tokens: int = 4) -> Batch:
    """Rows for the first group."""
    counts = np.array([1, 0, 2, 1])
    return Batch("experts-0", small.LAYER, counts, np.array([0, 3, 1, 0]), torch.randn(tokens, small.HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_transports_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    store = small.MemoryReferences()
    groups = {f"experts-{group}": small.expert_group(group, dtype) for group in range(small.GROUPS)}
    with small.serving(tmp_path, dtype=dtype, references=StoreCodec(store)) as (view, _):
        transports = [
            LocalTransport(groups),
            small.new_stream(),
            ObjectStoreTransport(small.new_stream(), store),
        ]
        dispatchers = [small.dispatcher(transport, view) for transport in transports]
        for tokens in (1, 3, 8, 64):
            layer = small.layer_input(tokens, dtype, seed=tokens)
            local, stream, object_store = (d.scatter_gather(small.LAYER, *layer) for d in dispatchers)
            assert local.dtype == dtype
            assert torch.equal(local, stream)
            assert torch.equal(local, object_store)
        for transport in transports:
            transport.close()


def test_hidden_states_are_put_once_for_all_groups_and_nothing_is_kept(tmp_path: Path) -> None:
    to_replicas, to_router = small.MemoryReferences(), small.MemoryReferences()

    class Both(small.MemoryReferences):
        """Puts of the router in one store, of the replicas in the other."""

        def get(self, name: bytes, timeout_s: float) -> Any:
            return to_router.get(name, timeout_s)

        def put(self, array: npt.NDArray[Any]) -> tuple[object, bytes]:
            return to_replicas.put(array)

    class Reverse(small.MemoryReferences):
        def get(self, name: bytes, timeout_s: float) -> Any:
            return to_replicas.get(name, timeout_s)

        def put(self, array: npt.NDArray[Any]) -> tuple[object, bytes]:
            return to_router.put(array)

    with small.serving(tmp_path, references=StoreCodec(Reverse())) as (view, servers):
        transport = ObjectStoreTransport(small.new_stream(), Both())
        dispatcher = small.dispatcher(transport, view)
        for step in range(3):
            dispatcher.scatter_gather(small.LAYER, *small.layer_input(8, torch.float32))
            assert (to_replicas.puts, to_router.puts) == (step + 1, small.GROUPS * (step + 1))
            assert len(to_replicas) == 0
        eventually(lambda: len(to_router) == 0)
        assert all(server.stats().references == 0 for server in servers)
        assert transport.bytes_sent == 3 * 8 * small.HIDDEN * 4
        assert transport.bytes_received == 3 * 8 * small.PER_TOKEN * small.HIDDEN * 4
        transport.close()


def test_a_lost_result_is_computed_again(tmp_path: Path) -> None:
    results, store = ForgetfulReferences(), small.MemoryReferences()
    results.arrays = store.arrays
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, _):
        transport = ObjectStoreTransport(small.new_stream(), results)
        dispatcher = small.dispatcher(transport, view)
        layer = small.layer_input(8, torch.float32)
        expected = dispatcher.scatter_gather(small.LAYER, *layer)
        results.lose = 1
        assert torch.equal(dispatcher.scatter_gather(small.LAYER, *layer), expected)
        stats = dispatcher.stats()
        assert stats.resends == 1
        eventually(lambda: len(store) == 0)
        transport.close()


def test_hidden_states_a_replica_cannot_read_are_sent_again(tmp_path: Path) -> None:
    store = ForgetfulReferences()
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, _):
        transport = ObjectStoreTransport(small.new_stream(), store)
        dispatcher = small.dispatcher(transport, view)
        layer = small.layer_input(8, torch.float32)
        expected = dispatcher.scatter_gather(small.LAYER, *layer)
        store.lose = 1
        assert torch.equal(dispatcher.scatter_gather(small.LAYER, *layer), expected)
        assert dispatcher.stats().resends == 1
        transport.close()


def test_a_forgotten_call_drops_what_was_put_and_releases_what_comes_late(tmp_path: Path) -> None:
    store = small.MemoryReferences()
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, servers):
        transport = ObjectStoreTransport(small.new_stream(), store)
        forgotten = transport.send(view.replicas[0], batch(), 5)
        transport.forget(forgotten)
        transport.forget(forgotten)
        assert not forgotten.done
        eventually(lambda: servers[0].stats().frames == 1)
        kept = transport.send(view.replicas[0], batch(), 5)
        assert transport.wait([kept], 5) == [kept]
        assert transport.wait([kept], 0) == [kept]
        assert kept.result().shape == (4, small.HIDDEN)
        eventually(lambda: len(store) == 0 and servers[0].stats().references == 0)
        transport.close()


def test_hidden_states_are_dropped_where_the_replica_cannot_be_reached(tmp_path: Path) -> None:
    store = small.MemoryReferences()
    transport = ObjectStoreTransport(small.new_stream(), store)
    with pytest.raises(ReplicaLostError):
        transport.send(small.replica(0, str(tmp_path / "nobody.sock")), batch(), 5)
    assert (store.puts, len(store)) == (1, 0)


def test_a_connection_that_breaks_ends_its_calls_and_drops_what_was_put(tmp_path: Path) -> None:
    store = small.MemoryReferences()
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, _):
        transport = ObjectStoreTransport(small.new_stream(), store)
        call = transport.send(view.replicas[0], batch(), 5)
        transport.retain(())
        assert transport.wait([call], 5) == [call]
        assert isinstance(call.error, ReplicaLostError)
        with pytest.raises(ReplicaLostError):
            call.result()
        eventually(lambda: len(store) == 0)


def test_no_call_is_done_before_its_answer(tmp_path: Path) -> None:
    store = small.MemoryReferences()
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, _):
        transport = ObjectStoreTransport(small.new_stream(), store)
        call = transport.send(view.replicas[0], batch(), 5)
        assert not call.done
        with pytest.raises(FabricError):
            call.result()
        transport.close()
        eventually(lambda: len(store) == 0)


def test_rows_are_read_by_token_and_do_not_touch_the_store() -> None:
    store = small.MemoryReferences()
    hidden = torch.randn(5, 8)
    holding, description = publish(store, hidden)
    index = np.array([4, 0, 0, 2])
    rows = StoreCodec(store).load(request(description, index), torch.tensor([1, 3]))
    assert torch.equal(rows, hidden[index])
    rows.zero_()
    assert torch.equal(read(store, description, 5), hidden)
    del holding
    with pytest.raises(ReplicaLostError):
        read(store, description, 5)


def test_hidden_states_need_not_be_contiguous() -> None:
    store = small.MemoryReferences()
    hidden = torch.randn(8, 5).T
    _holding, description = publish(store, hidden)
    assert torch.equal(read(store, description, 5), hidden)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_references_are_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    store = small.MemoryReferences()
    _holding, description = publish(store, torch.randn(5, 8))
    payload = bytearray(request(description, np.array([4, 0, 2])))
    if data.draw(st.booleans()):
        payload = payload[: data.draw(st.integers(0, len(payload)))]
    for _ in range(data.draw(st.integers(0, 3))):
        if payload:
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    counts = torch.tensor(data.draw(st.sampled_from([[3], [1, 2], [0], [4]])))
    try:
        rows = StoreCodec(store).load(bytes(payload), counts)
        assert rows.shape == (int(counts.sum()), 8)
    except (FrameError, ReplicaLostError):
        pass


def test_a_result_that_is_not_what_was_asked_for_is_refused() -> None:
    store = small.MemoryReferences()
    _holding, description = publish(store, torch.randn(5, 8))
    with pytest.raises(FrameError):
        read(store, description, 4)
    with pytest.raises(FrameError):
        read(store, description + b"x", 5)
    wider = bytearray(description)
    wider[7:11] = struct.pack("<I", 9)
    with pytest.raises(FrameError):
        read(store, bytes(wider), 5)

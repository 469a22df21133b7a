"""Races over real connections: what loses is written nowhere, and who cannot be connected to stops nobody (2 s)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.errors import ReplicaLostError
from cluster.fabric import stream as stream_module
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.object_store import ObjectStoreTransport, StoreCall
from cluster.fabric.store_codec import StoreCodec
from cluster.fabric.stream import StreamTransport
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous
from tests.cluster.fabric import small_experts as small
from tests.cluster.fabric.serving import (
    EXPERTS,
    LAYERS,
    NODE,
    WAIT_S,
    Gate,
    answered,
    batch,
    kept_files,
    replica_at,
    serving,
    socket_folder,
    transport,
    until,
)
from tests.cluster.fabric.test_object_store import batch as stored_batch

WIDE = 4096


def layer_input(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, WIDE], index and weight [T, 2]."""
    generator = torch.Generator().manual_seed(tokens)
    weight, index = torch.rand(tokens, EXPERTS, generator=generator).topk(2)
    return torch.randn(tokens, WIDE, generator=generator), index, weight


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("node", [NODE, "another-node"])
def test_an_answer_that_lost_the_race_reaches_no_result_of_any_layer(node: str, tokens: int) -> None:
    """The late answer is wrong, so that a single byte of it would show; all later ones are right."""
    gate = Gate()
    gate.open.set()

    def wrong(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        held = not gate.open.is_set()
        output = gate(layer, counts, rows)
        return output * 1000 if held else output

    with (
        serving(wrong, replica_id="late", hidden=WIDE, tcp=True) as (_, first),
        serving(replica_id="good", hidden=WIDE, tcp=True) as (_, second),
        transport(node_id=node) as stream,
    ):
        dispatcher = Dispatcher(
            contiguous(dict.fromkeys(LAYERS, EXPERTS), 1), stream, wait_s=WAIT_S, timeout_s=WAIT_S, hedge_after=3.0
        )
        # Speeds with which a layer is not split, and the late one comes first.
        fast = [
            replace(first, speed_rows_per_s=1e9, state=State.READY),
            replace(second, speed_rows_per_s=1e8, state=State.READY),
        ]
        dispatcher.update(View(Epoch("i", 1), (fast[1],)))
        given = layer_input(tokens)
        wanted = {layer: dispatcher.scatter_gather(layer, *given) for layer in LAYERS}
        dispatcher.update(View(Epoch("i", 2), tuple(fast)))
        until(lambda: stream.prepare(first, 0.0))
        gate.shut()
        assert torch.equal(dispatcher.scatter_gather(LAYERS[0], *given), wanted[LAYERS[0]])
        assert dispatcher.stats().replicas["late"].overtaken == 1
        assert len(gate.batches) == 1
        gate.open.set()
        hedging = dispatcher._hedging
        assert hedging is not None
        give_up_s = time.monotonic() + WAIT_S
        while hedging.watched:
            assert time.monotonic() < give_up_s
            for layer in LAYERS:
                assert torch.equal(dispatcher.scatter_gather(layer, *given), wanted[layer])


@contextmanager
def mute() -> Iterator[Replica]:
    """A replica that accepts, as the system does for one that is stopped, and never says anything."""
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        yield replica_at(Address(NODE, str(folder / "s"), "", 0))


def test_connecting_to_a_mute_replica_blocks_nobody_and_fails_once_its_time_is_up() -> None:
    with mute() as replica, transport(connect_timeout_s=0.3) as stream:
        start_s = time.monotonic()
        for _ in range(100):
            assert not stream.prepare(replica, 0.0)
        assert time.monotonic() - start_s < 0.2

        with pytest.raises(ReplicaLostError, match="did not finish the handshake"):
            until(lambda: stream.prepare(replica, 0.0))
        assert not stream.prepare(replica, 0.0)  # another attempt


def test_a_prepared_replica_is_connected_and_takes_rows() -> None:
    with serving() as (_, replica), transport() as stream:
        assert stream.prepare(replica, WAIT_S)
        assert stream.prepare(replica, 0.0)
        answered(stream, replica, batch())


def test_a_batch_waits_for_the_attempt_that_is_under_way() -> None:
    with serving() as (server, replica), transport() as stream:
        stream.prepare(replica, 0.0)
        answered(stream, replica, batch())
        assert server.stats().connections == 1


@pytest.mark.parametrize("late", [True, False])
def test_a_link_that_nobody_wants_any_more_is_closed_whenever_it_opens(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, go_on = threading.Event(), threading.Event()
    open_link = stream_module.open_link

    def slowly(replica: Replica, **options: object) -> object:
        link = open_link(replica, **options)  # type: ignore[arg-type]
        opened.set()
        assert go_on.wait(WAIT_S)
        return link

    monkeypatch.setattr(stream_module, "open_link", slowly)
    with serving() as (server, replica), transport() as stream:
        files = kept_files()
        stream.prepare(replica, 0.0)
        assert opened.wait(WAIT_S)
        if not late:
            go_on.set()
            until(stream._openings._openings[replica.id].ended.is_set)
        stream.retain(())
        go_on.set()
        until(lambda: server.stats().connections == 0)
        until(lambda: kept_files() <= files)


def test_a_watched_call_keeps_its_hidden_states_until_its_answer_was_noticed(tmp_path: Path) -> None:
    store = small.MemoryReferences()
    with small.serving(tmp_path, references=StoreCodec(store)) as (view, servers):
        stream: StreamTransport = small.new_stream()
        objects = ObjectStoreTransport(stream, store)
        replica = next(each for each in view.replicas if each.group == "experts-0")
        call = objects.send(replica, stored_batch(), WAIT_S)
        assert isinstance(call, StoreCall)
        objects.forget(call, watched=True)
        assert objects._published
        until(lambda: bool(stream.wait([], 0.01)) or call.done)
        assert call.error is None
        assert call.compute_s > 0
        objects.forget(call)
        assert not objects._published
        until(lambda: all(server.stats().references == 0 for server in servers))
        until(lambda: len(store) == 0)
        another = objects.send(replica, stored_batch(), WAIT_S)
        until(lambda: bool(objects.wait([another], 0.01)))
        objects.close()

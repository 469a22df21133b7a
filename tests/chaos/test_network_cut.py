"""The network between a router and an expert replica is cut for five seconds in the middle of decoding, and healed.

The replica runs in a network namespace of its own, joined to this one by a pair of virtual interfaces, and is reached
by TCP; the cut takes its end down. Where namespaces are not allowed a proxy of the test's own stops forwarding instead:
less than a cut, as the connections stay whole. Without Ray (about 35 s).
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import pytest

from cluster.membership import Replica
from tests.chaos.split_router import GROUPS, HEDGED_S, Model, Router, routing, small_model
from tests.expert_pool import ExpertPool

CUT_S = 5.0
BACK_S = 5.0
"""After healing: a retransmission or a new connection, a few seconds apart by then."""
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET, for setns(2)."""


@dataclass(frozen=True)
class Network:
    """How a replica far away is reached. host: where it listens. enter: moves the calling thread there."""

    host: str
    enter: Callable[[], None]
    reached: Callable[[Replica], Replica]
    cut: Callable[[], None]
    heal: Callable[[], None]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@contextmanager
def namespace() -> Iterator[Network]:
    """A network namespace with one link to this one; both are gone at the end, whatever happens.

    Raises:
        OSError, CalledProcessError: this user, or this machine, may not.
    """
    # 16 bits of the process id: tests that run beside this one have networks of their own.
    number = os.getpid() % (1 << 14)
    name, near, far = f"xs{number}", f"xsn{number}", f"xsf{number}"
    network = f"10.{200 + number // (1 << 12)}.{number // 16 % 256}."
    ours, theirs = (f"{network}{number % 16 * 4 + end}" for end in (1, 2))
    with ExitStack() as undo:
        undo.callback(subprocess.run, ["ip", "netns", "delete", name], capture_output=True, timeout=10, check=False)
        ip("netns", "add", name)
        undo.callback(subprocess.run, ["ip", "link", "delete", near], capture_output=True, timeout=10, check=False)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("address", "add", f"{ours}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "address", "add", f"{theirs}/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ip("-n", name, "link", "set", "lo", "up")

        def enter() -> None:
            with open(f"/run/netns/{name}", "rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
                    raise OSError(ctypes.get_errno(), "setns")

        yield Network(
            theirs,
            enter,
            reached=lambda record: record,
            cut=lambda: ip("-n", name, "link", "set", far, "down"),
            heal=lambda: ip("-n", name, "link", "set", far, "up"),
        )


@contextmanager
def proxied() -> Iterator[Network]:
    """A TCP proxy on this machine that stops forwarding."""
    flowing = threading.Event()
    flowing.set()
    with ExitStack() as undo:
        ports: dict[int, int] = {}

        def forward(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    flowing.wait()
                    target.sendall(data)

        def accept(listener: socket.socket, port: int) -> None:
            with suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    for sock in (near, far):
                        undo.callback(sock.close)
                        undo.callback(_shut, sock)
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=forward, args=pair, daemon=True).start()

        def reached(record: Replica) -> Replica:
            port = record.address.port
            if port not in ports:
                listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
                undo.callback(_shut, listener)
                ports[port] = listener.getsockname()[1]
                threading.Thread(target=accept, args=(listener, port), daemon=True).start()
            return replace(record, address=replace(record.address, port=ports[port]))

        undo.callback(flowing.set)
        yield Network("127.0.0.1", lambda: None, reached, flowing.clear, flowing.set)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """For the whole module."""
    return small_model(tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def network(record_testsuite_property: Callable[[str, object], None]) -> Iterator[Network]:
    """A real cut where that is possible."""
    with ExitStack() as undo:
        try:
            made = undo.enter_context(namespace())
            record_testsuite_property("network", "namespace")
        except (OSError, subprocess.CalledProcessError):
            made = undo.enter_context(proxied())
            record_testsuite_property("network", "proxy")
        yield made


@pytest.fixture(scope="module")
def far(model: Model, network: Network) -> Iterator[list[Replica]]:
    """A replica of each group on the other side."""
    pools: list[ExpertPool] = []

    def start() -> None:
        network.enter()  # this thread only, and what it starts
        pools.append(ExpertPool(GROUPS))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with pools[0] as pool:
        started = pool.serve(model.blueprint, model.config().experts, host=network.host)
        yield [
            network.reached(replace(each.record, address=replace(each.record.address, node="far", unix_path="")))
            for each in started
        ]


@pytest.fixture(scope="module")
def near(model: Model) -> Iterator[list[Replica]]:
    """A replica of each group on this side, named after those far away."""
    with ExpertPool(2 * GROUPS) as pool:
        started = pool.serve(model.blueprint, model.config().experts)
        yield [each.record for each in started[GROUPS:]]


@contextmanager
def cut(network: Network, seconds: float) -> Iterator[Callable[[], None]]:
    """What cuts the network and heals it so many seconds later; healed at the end in any case."""
    timer = threading.Timer(seconds, network.heal)

    def begin() -> None:
        network.cut()
        timer.start()

    try:
        yield begin
    finally:
        timer.cancel()
        network.heal()


def steady(router: Router) -> None:
    """Connections are open, replicas known."""
    for _ in range(3):
        router.answer()
    router.forget()


def test_a_cut_stalls_no_stream_for_longer_than_a_hedge_takes_where_another_replica_is_reachable(
    model: Model, network: Network, far: list[Replica], near: list[Replica]
) -> None:
    with routing(model, [*far, *near], timeout_s=3.0) as router, cut(network, CUT_S) as begin:
        steady(router)
        assert all(router.stats.replicas[each.id].rows for each in far)
        cut_s = time.monotonic()
        router.answer(begin)
        while time.monotonic() < cut_s + CUT_S + 1.0:
            router.answer()
        assert router.longest_s < HEDGED_S
        assert set(router.lost) == {each.id for each in far}
        before = [router.stats.replicas[each.id].rows for each in far]
        router.until(lambda: all(router.stats.replicas[r.id].rows > rows for r, rows in zip(far, before, strict=True)))
        assert router.longest_s < HEDGED_S
        assert router.ties == 0


@pytest.mark.parametrize("timeout_s", [3.0, 10.0])
def test_requests_wait_for_the_network_where_no_other_replica_is_reachable_and_go_on_when_it_is_back(
    timeout_s: float, model: Model, network: Network, far: list[Replica]
) -> None:
    """Within the timeout by the same connections, beyond it by new ones."""
    with routing(model, far, timeout_s=timeout_s, wait_s=30.0) as router, cut(network, CUT_S) as begin:
        steady(router)
        router.answer(begin)
        assert CUT_S - 1.0 < router.longest_s < CUT_S + BACK_S
        assert router.ties == 0

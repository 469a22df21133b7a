"""Waiting for sockets. 0.1 s."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cluster.fabric.sockets import READ, WRITE, Poller


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_only_what_was_asked_for_is_ready(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    poller: Poller[str] = Poller()
    poller.register(left, READ, "left")
    assert poller.poll(0.0) == []
    right.send(b"x")
    assert poller.poll(1.0) == [("left", READ)]
    poller.modify(left, WRITE)
    assert poller.poll(1.0) == [("left", WRITE)]
    poller.unregister(left)
    assert poller.poll(0.0) == []
    poller.close()
    poller.close()


def test_a_socket_at_its_end_is_ready_for_everything(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    poller: Poller[str] = Poller()
    poller.register(left, READ, "left")
    right.close()
    assert poller.poll(1.0) == [("left", READ | WRITE)]
    poller.close()

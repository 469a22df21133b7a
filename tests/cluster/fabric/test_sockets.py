"""Waiting for sockets. 0.1 s."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cluster.errors import ConfigError
from cluster.fabric.sockets import READ, WRITE, Poller, listen_tcp


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


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 70])
def test_a_host_that_cannot_be_listened_on_is_an_error_of_the_config(host: str) -> None:
    with pytest.raises(ConfigError, match=r"experts\.host: '.*' cannot be listened on"):
        listen_tcp(host)

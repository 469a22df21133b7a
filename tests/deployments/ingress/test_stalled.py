"""Clients that do not read are cut off next to the socket, others stay; under uvicorn, as in Serve's proxy. 5 s."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from deployments.ingress.stalled import VARIABLE, CutOff, stalled_s

STALL_S = 0.3
PIECE = b"x" * 65536


class Endless:
    """Sends until its client is gone; `gone` when it has been told so."""

    def __init__(self) -> None:
        self.sent = 0
        self.gone = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not self.gone.is_set():
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            self.sent += 1
            await asyncio.sleep(0)
        await watching


@asynccontextmanager
async def asked(app: Any, buffer_bytes: int = 4096) -> AsyncIterator[socket.socket]:
    """The socket of a client that has asked and read nothing."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        serving = asyncio.create_task(server.serve([listener]))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, listener.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            yield client
        finally:
            server.should_exit = server.force_exit = True
            await serving


def test_a_client_that_never_reads_is_cut_off_and_the_application_told() -> None:
    async def story() -> None:
        app = Endless()
        async with asked(CutOff(app, STALL_S)) as client:
            await asyncio.wait_for(app.gone.wait(), 10)
            # What the kernel has it may still read; then comes the end, or an error.
            with contextlib.suppress(ConnectionError):
                while await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1 << 20), 5):
                    pass

    asyncio.run(story())


def test_a_client_that_reads_slowly_but_reads_stays() -> None:
    async def story() -> None:
        app = Endless()
        # Long, because client and server share one loop, which may stand still for a while on a busy machine.
        async with asked(CutOff(app, 10 * STALL_S), 1 << 20) as client:
            loop = asyncio.get_running_loop()
            until_s = loop.time() + 13 * STALL_S
            while loop.time() < until_s:
                assert await loop.sock_recv(client, 1 << 18)
                await asyncio.sleep(0.005)
            assert not app.gone.is_set()

    asyncio.run(story())


def test_a_client_that_waits_for_the_server_is_not_stalled() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001 - ASGI's
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(2 * STALL_S)
        await send({"type": "http.response.body", "body": b"at last", "more_body": False})

    async def story() -> bytes:
        async with asked(CutOff(slow, STALL_S)) as client:
            answer = b""
            while b"at last" not in answer:
                piece = await asyncio.get_running_loop().sock_recv(client, 4096)
                assert piece
                answer += piece
            return answer

    assert b" 200 " in asyncio.run(story())


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=VARIABLE):
        stalled_s()

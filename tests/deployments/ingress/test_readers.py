"""Clients that read slowly, not at all, or send slowly, over real sockets: what they hold, and for how long. About 8 s.

The router's side is the real outbox under a fake engine, so that what waits for a slow reader can be counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import uvicorn

from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.service import Service
from deployments.router.outbox import Outbox, generate
from tests.deployments.ingress.fakes import make_service, says

TOKENS = 20_000


class EagerEngine:
    """Has all tokens of a request long before anybody reads them; `done` when it holds nothing any more."""

    responsive = True

    def __init__(self) -> None:
        self.outboxes: list[Outbox] = []
        self.done = asyncio.Event()
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest, emit: Outbox) -> None:
        self.outboxes.append(emit)
        for index in range(request.sampling.max_tokens):
            last = index == request.sampling.max_tokens - 1
            emit(TokenChunk(0, (5 + index % 200,), finish_reason="length" if last else None))
        self.done.set()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


class OneRouter:
    """A `RouterClient` whose answers come one token a chunk, as from a router that is never ahead."""

    def __init__(self, engine: EagerEngine, *, endless: bool) -> None:
        self._engine = engine
        self._endless = endless
        self.closed = asyncio.Event()
        self.sent = 0

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        assert session_id is None
        try:
            if not self._endless:
                async with aclosing(generate(self._engine, request)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        if isinstance(message, TokenChunk):
                            self.sent += 1
                            yield message
            while self._endless:
                self.sent += 1
                yield TokenChunk(0, (5,))
                await asyncio.sleep(0)
        finally:
            self.closed.set()


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[int]:
    """The port of the application under uvicorn, in this loop."""
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


@asynccontextmanager
async def asking(port: int, body: dict[str, Any]) -> AsyncIterator[socket.socket]:
    """A socket with small buffers that has sent a request and read nothing."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        await loop.sock_sendall(client, head.encode() + raw)
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hi", "stream": True, "ignore_eos": True, "max_tokens": 200} | fields


def test_a_reader_of_one_byte_a_second_keeps_the_engine_from_nothing_and_holds_one_chunk_of_tokens() -> None:
    async def run() -> None:
        engine = EagerEngine()
        router = OneRouter(engine, endless=False)
        async with listening(make_service(says(""), router=router)) as port:
            async with asking(port, body()) as client:
                await asyncio.wait_for(engine.done.wait(), 5)
                # All tokens of the request in one chunk: the outbox merges what nobody has taken.
                await asyncio.wait_for(router.closed.wait(), 5)
                assert router.sent == 1
                assert len(await asyncio.get_running_loop().sock_recv(client, 1)) == 1
            assert engine.cancelled == []

    asyncio.run(run())


def test_a_reader_that_never_reads_is_cut_off_at_the_deadline_and_stops_the_router_long_before() -> None:
    """What it holds: the sockets' buffers, then the write buffer of the server (64 KiB) and one event."""

    async def run() -> tuple[int, float]:
        router = OneRouter(EagerEngine(), endless=True)
        async with (
            listening(make_service(says(""), router=router, request_timeout_s=4.0)) as port,
            asking(port, body()) as _client,
        ):
            while router.sent < 10:
                await asyncio.sleep(0.01)
            before = -1
            while before != router.sent:  # until the buffers are full
                before = router.sent
                await asyncio.sleep(0.2)
            assert not router.closed.is_set()
            start = asyncio.get_running_loop().time()
            await asyncio.wait_for(router.closed.wait(), 10)
            return router.sent, asyncio.get_running_loop().time() - start

    sent, waited_s = asyncio.run(run())
    assert sent < TOKENS
    assert waited_s < 6


def test_a_reader_that_goes_away_ends_the_work_at_once() -> None:
    async def run() -> None:
        router = OneRouter(EagerEngine(), endless=True)
        async with listening(make_service(says(""), router=router)) as port:
            async with asking(port, body()):
                while router.sent < 10:
                    await asyncio.sleep(0.01)
            await asyncio.wait_for(router.closed.wait(), 5)

    asyncio.run(run())


def test_a_body_of_one_byte_at_a_time_is_answered_408_after_the_bound() -> None:
    async def run() -> tuple[bytes, float]:
        loop = asyncio.get_running_loop()
        async with listening(make_service(says("hi"), body_timeout_s=0.5)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            start = loop.time()

            async def drip() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        writer.write(b" ")
                        await writer.drain()
                        await asyncio.sleep(0.1)

            dripping = asyncio.create_task(drip())
            status = await asyncio.wait_for(reader.readline(), 5)
            took_s = loop.time() - start
            dripping.cancel()
            writer.close()
            return status, took_s

    status, took_s = asyncio.run(run())
    assert b" 408 " in status
    assert 0.4 < took_s < 2

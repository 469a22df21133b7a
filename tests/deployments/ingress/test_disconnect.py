"""A client that goes away ends the work on the router, streaming or not, however the server tells (1 s)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from typing import Any

import pytest

from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.service import Service
from tests.deployments.ingress.fakes import TOKENIZER, FakeRouter, http, make_service


def half_an_answer(_request: GenerationRequest) -> Iterable[TokenChunk | str]:
    yield TokenChunk(0, tuple(TOKENIZER.text_tokens("half an answer")))
    yield "hang"


def nothing(_request: GenerationRequest) -> Iterable[str]:
    yield "hang"


def endless(_request: GenerationRequest) -> Iterable[TokenChunk]:
    while True:
        yield TokenChunk(0, (5,))


class Connection:
    """An ASGI server's side of one request: the body, then silence until `gone` is set."""

    def __init__(self, stream: bool, prompt: Any = "hi") -> None:
        self.body = json.dumps({"model": "demo", "prompt": prompt, "stream": stream}).encode()
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.send_fails = False
        self._body_read = False

    async def receive(self) -> dict[str, Any]:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.send_fails and self.sent:
            raise OSError("broken pipe")
        self.sent.append(message)
        await asyncio.sleep(0)

    def start(self, service: Service) -> asyncio.Task[None]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        return asyncio.create_task(create_app(service)(scope, self.receive, self.send))


def ids(service: Service) -> tuple[list[str], list[str]]:
    """(requests that reached the router, those of them that were cancelled)."""
    assert isinstance(service.router, FakeRouter)
    return [request.request_id for request in service.router.requests], sorted(service.router.cancelled)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [half_an_answer, nothing], ids=["in the middle", "before the first token"])
@pytest.mark.parametrize("how", ["message", "cancelled task"])
def test_work_ends_when_the_client_goes(stream: bool, script: Any, how: str) -> None:
    async def run() -> None:
        service = make_service(script)
        connection = Connection(stream)
        task = connection.start(service)
        assert isinstance(service.router, FakeRouter)
        await asyncio.wait_for(service.router.hanging.wait(), 5)
        if how == "message":
            connection.gone.set()
        else:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        requests, cancelled = ids(service)
        assert len(requests) == 1
        assert cancelled == requests

    asyncio.run(run())


def test_work_ends_when_sending_fails() -> None:
    async def run() -> None:
        service = make_service(endless)
        connection = Connection(stream=True)
        connection.send_fails = True
        await asyncio.wait_for(connection.start(service), 5)
        requests, cancelled = ids(service)
        assert cancelled == requests

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_s_work_ends(stream: bool) -> None:
    async def run() -> None:
        service = make_service(nothing)
        connection = Connection(stream, ["a", "b", "c"])
        task = connection.start(service)
        while len(ids(service)[0]) < 3:
            await asyncio.sleep(0)
        connection.gone.set()
        await asyncio.wait_for(task, 5)
        requests, cancelled = ids(service)
        assert cancelled == sorted(requests)

    asyncio.run(run())


def test_when_one_prompt_fails_the_others_end() -> None:
    def script(request: GenerationRequest) -> Iterable[TokenChunk | str | Exception]:
        yield RuntimeError("lost") if request.request_id.endswith("-1") else "hang"

    async def run() -> None:
        service = make_service(script)
        async with http(service) as client:
            response = await client.post("/v1/completions", json={"model": "demo", "prompt": ["a", "b", "c"]})
        assert response.status_code == 500
        requests, cancelled = ids(service)
        assert cancelled == sorted(id for id in requests if not id.endswith("-1"))

    asyncio.run(run())


def test_silent_router_ends_in_a_deadline() -> None:
    async def run() -> None:
        service = make_service(nothing, request_timeout_s=0.05)
        async with http(service) as client:
            response = await client.post("/v1/completions", json={"model": "demo", "prompt": "a"})
        assert response.status_code == 504
        requests, cancelled = ids(service)
        assert cancelled == requests

    asyncio.run(run())

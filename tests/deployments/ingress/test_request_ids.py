"""One id for a request, everywhere: on every answer, in every line about it, and where Serve's proxy reads it (3 s)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray.serve._private import http_util
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from cluster.errors import DeadlineError, EngineError, ExpertsUnavailableError, OverloadedError, RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.clients import Health
from deployments.ingress.keys import KeyRecord, digest_of
from deployments.ingress.proxy import middlewares
from deployments.ingress.request_ids import HEADER, MAX_CHARS, RequestIds
from deployments.ingress.resume import ResumingRouter
from deployments.ingress.stalled import STALLED_S, CutOff
from deployments.launch import serve_environment
from tests.deployments.ingress.fakes import FakeCluster, FakeRouter, Script, http, make_service, says

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GIVEN = "a-client's/own:id=7!"


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hi", "max_tokens": 2, **fields}


def raising(error: Exception) -> Script:
    return lambda _request: [error]


KEYED = Authenticator(Keys((KeyRecord("someone", digest_of("xs-key")),)))
HEALTHY, AWAY = FakeCluster(), FakeCluster(RuntimeError("no directory"))
# (status, what is asked for, what the service is like)
ANSWERS: list[tuple[int, tuple[str, str, Any], dict[str, Any]]] = [
    (200, ("POST", TEXT, text()), {}),
    (200, ("POST", TEXT, text(stream=True)), {}),
    (200, ("POST", CHAT, {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}), {}),
    (200, ("GET", "/v1/models", None), {}),
    (200, ("GET", "/v1/cluster", None), {}),
    (200, ("GET", "/v1/cluster/loads", None), {}),
    (200, ("GET", "/openapi.json", None), {}),
    (200, ("GET", "/dashboard", None), {}),
    (200, ("GET", "/dashboard/plotly.min.js", None), {}),
    (200, ("GET", "/health", None), {}),
    (503, ("GET", "/health", None), {"cluster": AWAY}),
    (503, ("GET", "/health", None), {"cluster": FakeCluster(Health(("router",)))}),
    (400, ("POST", TEXT, text(top_p=7)), {}),
    (400, ("POST", TEXT, "no json"), {}),
    (401, ("POST", TEXT, text()), {"auth": KEYED}),
    (401, ("GET", "/v1/cluster", None), {"auth": KEYED}),
    (401, ("GET", "/dashboard/events", None), {"auth": KEYED}),
    (404, ("POST", TEXT, text(model="other")), {}),
    (404, ("GET", "/nowhere", None), {}),
    (404, ("GET", "/dashboard/nothing.js", None), {}),
    (405, ("GET", TEXT, None), {}),
    (413, ("POST", TEXT, text(prompt="x" * 100)), {"max_body_bytes": 50}),
    (429, ("POST", TEXT, text()), {"script": raising(OverloadedError("full"))}),
    (429, ("POST", TEXT, text(stream=True)), {"script": raising(OverloadedError("full"))}),
    (500, ("POST", TEXT, text()), {"script": raising(EngineError("broken"))}),
    (500, ("POST", TEXT, text()), {"script": raising(ValueError("nobody foresaw this"))}),
    (503, ("POST", TEXT, text()), {"script": raising(ExpertsUnavailableError("experts-0 is missing"))}),
    (504, ("POST", TEXT, text()), {"script": raising(DeadlineError("late"))}),
]


async def ask(asked: tuple[str, str, Any], changes: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    method, path, body = asked
    content = body if isinstance(body, str) or body is None else json.dumps(body)
    script = changes.get("script", says("hello", finish="length"))
    others = {name: value for name, value in changes.items() if name != "script"}
    async with http(make_service(script, **others)) as client:
        return await client.request(method, path, content=content, headers=headers)


def ids(response: httpx.Response) -> list[str]:
    return response.headers.get_list(HEADER)


@pytest.mark.parametrize(("status", "asked", "changes"), ANSWERS)
def test_every_answer_has_the_id_that_was_given(
    status: int, asked: tuple[str, str, Any], changes: dict[str, Any]
) -> None:
    response = asyncio.run(ask(asked, changes, {HEADER: GIVEN}))
    assert response.status_code == status, response.text
    assert ids(response) == [GIVEN]


@pytest.mark.parametrize(("status", "asked", "changes"), ANSWERS)
def test_every_answer_has_an_id_where_none_was_given(
    status: int, asked: tuple[str, str, Any], changes: dict[str, Any]
) -> None:
    first, second = (asyncio.run(ask(asked, changes, {})) for _ in range(2))
    assert first.status_code == status
    [one], [other] = ids(first), ids(second)
    assert one
    assert one != other


def test_too_many_headers_are_refused_with_the_id_as_well() -> None:
    headers = {f"x-{i}": "1" for i in range(150)} | {HEADER: GIVEN}
    response = asyncio.run(ask(("GET", "/health", None), {}, headers))
    assert (response.status_code, ids(response)) == (431, [GIVEN])


def test_the_stream_of_the_live_picture_has_the_id() -> None:
    async def first_message() -> dict[str, Any]:
        sent: asyncio.Queue[Any] = asyncio.Queue()
        scope = {
            "type": "http", "method": "GET", "path": "/dashboard/events", "query_string": b"", "root_path": "",
            "headers": [(HEADER.encode(), GIVEN.encode())],
        }  # fmt: skip
        never = asyncio.Event()
        task = asyncio.create_task(create_app(make_service(says("x")))(scope, never.wait, sent.put))
        message: dict[str, Any] = await sent.get()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return message

    headers = asyncio.run(first_message())["headers"]
    assert [value for name, value in headers if name == HEADER.encode()] == [GIVEN.encode()]


BAD = [b"", b" ", b"two words", b"x" * (MAX_CHARS + 1), b"caf\xc3\xa9", b"tab\tbed", b"\xff\xfe", b"bell\x07"]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the ids that the application sees."""
    await JSONResponse(Request(scope).headers.getlist(HEADER))(scope, receive, send)


def called(app: ASGIApp, *given: bytes) -> httpx.Response:
    async def call() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/", headers=[(HEADER.encode(), value) for value in given])

    return asyncio.run(call())


def in_serves_proxy(app: ASGIApp) -> ASGIApp:
    """Serve's own middleware and ours around it, as Serve puts them."""
    return http_util._apply_middlewares(app, middlewares())


@pytest.mark.parametrize("around", [lambda app: RequestIds(app, tell=True), in_serves_proxy], ids=["alone", "proxy"])
@pytest.mark.parametrize("given", [*([value] for value in BAD), [b"one", b"two"], []], ids=repr)
def test_what_is_no_id_is_replaced(around: Any, given: list[bytes]) -> None:
    response = called(around(echo), *given)
    [told] = ids(response)
    assert response.json() == [told]
    assert told.isascii()
    assert 0 < len(told) <= MAX_CHARS
    assert told.encode() not in given


@pytest.mark.parametrize("around", [lambda app: RequestIds(app, tell=True), in_serves_proxy], ids=["alone", "proxy"])
@pytest.mark.parametrize("given", ["7", "x" * MAX_CHARS, GIVEN, "00-af01-b7ad;~"])
def test_what_can_be_an_id_is_kept(around: Any, given: str) -> None:
    response = called(around(echo), given.encode())
    assert ids(response) == response.json() == [given]


def test_behind_the_proxy_the_id_is_told_once() -> None:
    app = create_app(make_service(says("x")), proxied=True)
    assert ids(called(app, GIVEN.encode())) == []
    assert ids(called(in_serves_proxy(app), GIVEN.encode())) == [GIVEN]


def test_an_answer_that_brings_an_id_of_its_own_loses_it() -> None:
    response = called(RequestIds(Response("", headers={HEADER: "another"}), tell=True), GIVEN.encode())
    assert ids(response) == [GIVEN]


def test_serve_finds_the_middlewares_where_serve_env_says(monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve_environment()["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    monkeypatch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", path)
    made = http_util.configure_http_middlewares(http_util.HTTPOptions(middlewares=[])).middlewares
    # The last one stands next to the socket.
    assert [(each.cls, each.kwargs) for each in made] == [
        (RequestIds, {"tell": False}),
        (CutOff, {"stalled_s": STALLED_S}),
    ]


def test_two_requests_of_one_id_are_two_requests() -> None:
    service = make_service(says("hello", finish="length"))

    async def both() -> list[httpx.Response]:
        async with http(service) as client:
            posts = [client.post(TEXT, json=text(prompt=["a", "b"]), headers={HEADER: GIVEN}) for _ in range(2)]
            return list(await asyncio.gather(*posts))

    responses = asyncio.run(both())
    assert [(each.status_code, ids(each)) for each in responses] == [(200, [GIVEN])] * 2
    assert isinstance(service.router, FakeRouter)
    requests = service.router.requests
    assert {request.x_request_id for request in requests} == {GIVEN}
    assert len({request.request_id for request in requests}) == len(requests) == 4


def test_a_request_that_goes_on_elsewhere_keeps_its_id() -> None:
    def script(request: GenerationRequest) -> Iterator[TokenChunk | Exception]:
        yield TokenChunk(0, (5,), None, "length" if "/" in request.request_id else None)
        yield RouterStoppingError("going")

    router = FakeRouter(script)
    resuming = ResumingRouter(router, clock=lambda: 0.0, pause_s=0.0)
    response = asyncio.run(ask(("POST", TEXT, text()), {"router": resuming}, {HEADER: GIVEN}))
    assert response.status_code == 200
    assert [request.x_request_id for request in router.requests] == [GIVEN, GIVEN]

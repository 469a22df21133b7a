"""Whatever ends a request to generate, it is counted once, as what it was. Over fake routers, a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import errors
from cluster.errors import ExpertScaleError, error_code
from cluster.metering import Meter
from cluster.metrics import (
    FINISHED_CHOICES,
    FIRST_TOKEN_S,
    NEXT_TOKEN_S,
    OPEN_REQUESTS,
    REQUEST_ERRORS,
    REQUEST_S,
    REQUESTS,
    sections,
)
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.auth import Authenticator, KeyFile
from deployments.ingress.keys import digest_of
from deployments.ingress.metering import CHAT, COMPLETIONS, OK, USUAL_ERRORS, RequestMetering
from tests.deployments.ingress.fakes import FakeRouter, Script, http, make_service, says
from tests.recorder import Recorder

EVERY_ERROR = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ExpertScaleError)]
ASK = {"model": "demo", "prompt": "hi"}


class Clock:
    """A quarter of a second passes with each look at it."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


class Counted:
    """A service whose requests are counted by a recorder."""

    def __init__(self, script: Script, **changes: Any) -> None:
        self.recorder = Recorder()
        self.metering = RequestMetering(Meter(self.recorder), Clock())
        self.service = make_service(script, metering=self.metering, **changes)

    def post(self, path: str = COMPLETIONS, body: Any = ASK, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with http(self.service) as client:
                if isinstance(body, bytes):
                    return await client.post(path, content=body, **arguments)
                return await client.post(path, json=body, **arguments)

        return asyncio.run(send())

    @property
    def outcomes(self) -> dict[tuple[str, str], float]:
        """(endpoint, outcome or code) -> how many, those of none left out."""
        names = (REQUESTS.name, REQUEST_ERRORS.name)
        found = {}
        for (name, labels), value in self.recorder.values.items():
            if name in names and value:
                given = dict(labels)
                found[given["endpoint"], given.get("outcome") or given["code"]] = value
        self.metering.tell(Meter(self.recorder))
        assert self.recorder.of(OPEN_REQUESTS) == 0, "nothing is left open"
        return found


def failing(error: Exception, after: int = 0) -> Script:
    def script(_: GenerationRequest) -> Iterable[TokenChunk | Exception | str]:
        yield from [TokenChunk(0, (40,))] * after
        yield error

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_is_ok_with_its_times(stream: bool) -> None:
    counted = Counted(says("abc", finish="length"))
    assert counted.post(body=ASK | {"stream": stream}).status_code == 200
    assert counted.outcomes == {(COMPLETIONS, OK): 1}
    assert counted.recorder.of(FINISHED_CHOICES, reason="length") == 1
    # Looked at the clock: arrival, one look a token, the end.
    assert counted.recorder.seen(FIRST_TOKEN_S, endpoint=COMPLETIONS) == [0.25]
    assert counted.recorder.seen(NEXT_TOKEN_S, endpoint=COMPLETIONS) == [0.25]
    assert counted.recorder.seen(REQUEST_S, endpoint=COMPLETIONS) == [1.0]


def test_every_metric_of_requests_is_published_and_no_other() -> None:
    counted = Counted(says("abc"))
    counted.post()
    counted.post(body={})
    counted.metering.tell(Meter(counted.recorder))
    expected = {metric.name for section, those in sections().items() for metric in those if "Ingress" in section.by}
    assert counted.recorder.names == expected


def test_each_choice_is_counted_and_a_chat_by_its_own_endpoint() -> None:
    counted = Counted(says("abc"))
    messages = [{"role": "user", "content": "hi"}]
    assert counted.post(CHAT, {"model": "demo", "messages": messages, "n": 3}).status_code == 200
    assert counted.outcomes == {(CHAT, OK): 1}
    assert counted.recorder.of(FINISHED_CHOICES, reason="stop") == 3
    assert len(counted.recorder.seen(NEXT_TOKEN_S, endpoint=CHAT)) == 3
    assert len(counted.recorder.seen(FIRST_TOKEN_S, endpoint=CHAT)) == 1


def test_a_choice_of_one_token_has_no_time_to_the_next() -> None:
    counted = Counted(says("a", finish="length"))
    counted.post()
    assert counted.recorder.of(FINISHED_CHOICES, reason="length") == 1
    assert counted.recorder.seen(NEXT_TOKEN_S, endpoint=COMPLETIONS) == []


def test_tokens_of_one_chunk_are_no_time_apart_and_those_after_it_share_its_time() -> None:
    together = [TokenChunk(0, (40, 41, 42)), TokenChunk(0, (43, 44), None, "length")]
    counted = Counted(lambda _: together)
    counted.post()
    assert counted.recorder.seen(NEXT_TOKEN_S, endpoint=COMPLETIONS) == [0.25 / 2]


def test_a_choice_that_a_stop_string_ends_is_counted_as_the_client_sees_it() -> None:
    counted = Counted(says("abcdef", finish="length"))
    counted.post(body=ASK | {"stop": "c"})
    assert counted.recorder.of(FINISHED_CHOICES, reason="stop") == 1
    assert counted.recorder.of(FINISHED_CHOICES, reason="length") == 0


@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_every_class_of_error_has_its_code(kind: type[ExpertScaleError], stream: bool) -> None:
    counted = Counted(failing(kind("went wrong"), after=int(stream)))
    counted.post(body=ASK | {"stream": stream})
    assert counted.outcomes == {(COMPLETIONS, "error"): 1, (COMPLETIONS, error_code(kind(""))): 1}
    assert counted.recorder.seen(REQUEST_S, endpoint=COMPLETIONS) == []


def test_an_error_nobody_foresaw_is_one_too() -> None:
    counted = Counted(failing(ZeroDivisionError()))
    assert counted.post().status_code == 500
    assert counted.outcomes == {(COMPLETIONS, "error"): 1, (COMPLETIONS, "unforeseen"): 1}


def test_what_is_refused_before_a_router_is_asked_counts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{digest_of('secret').hex()} requests_per_min=5\n")
    keys.chmod(0o600)
    counted = Counted(says("abc"), auth=Authenticator(KeyFile(keys)), max_body_bytes=1000)
    key = {"Authorization": "Bearer secret"}
    sent: list[tuple[Any, dict[str, str], int, str]] = [
        (ASK, {}, 401, "authentication"),
        (ASK | {"max_tokens": -1}, key, 400, "request"),
        (ASK | {"model": "another"}, key, 404, "model_not_found"),
        (b" " * 2000, key, 413, "body_too_large"),
        (ASK, key | {"x-long": "x" * 40_000}, 431, "headers_too_large"),
        (b"{", key, 400, "request"),
        (ASK, key, 200, ""),
        (ASK, key, 429, "rate_limit"),
    ]
    for body, headers, status, _ in sent:
        assert counted.post(body=body, headers=headers).status_code == status
    codes = [code for *_, code in sent if code]
    expected = {(COMPLETIONS, code): float(codes.count(code)) for code in codes}
    assert counted.outcomes == expected | {(COMPLETIONS, OK): 1, (COMPLETIONS, "error"): len(codes)}
    assert isinstance(counted.service.router, FakeRouter)
    assert len(counted.service.router.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("how", ["message", "cancelled task"])
def test_a_client_that_goes_away_is_no_error(stream: bool, tokens: int, how: str) -> None:
    def script(_: GenerationRequest) -> Iterable[TokenChunk | str]:
        yield from [TokenChunk(0, (40,))] * tokens
        yield "hang"

    counted = Counted(script)

    async def run() -> None:
        gone = asyncio.Event()
        body = json.dumps(ASK | {"stream": stream}).encode()
        told = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if told:
                return told.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            await asyncio.sleep(0)

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": COMPLETIONS}
        scope |= {"raw_path": b"", "query_string": b"", "root_path": "", "headers": []}
        task = asyncio.create_task(create_app(counted.service)(scope, receive, send))  # type: ignore[arg-type]
        assert isinstance(counted.service.router, FakeRouter)
        await asyncio.wait_for(counted.service.router.hanging.wait(), 5)
        assert counted.metering.open == 1
        if how == "message":
            gone.set()
        else:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(run())
    assert counted.outcomes == {(COMPLETIONS, "client_gone"): 1}
    assert len(counted.recorder.seen(FIRST_TOKEN_S, endpoint=COMPLETIONS)) == min(1, tokens)
    assert counted.recorder.of(FINISHED_CHOICES, reason="stop") == 0


def test_other_pages_are_not_counted() -> None:
    counted = Counted(says("abc"))

    async def look() -> None:
        async with http(counted.service) as client:
            for path in ("/health", "/v1/models", "/v1/cluster", "/nothing"):
                await client.get(path)
            await client.get(COMPLETIONS)  # 405

    asyncio.run(look())
    assert counted.outcomes == {}


def test_the_series_of_usual_errors_begin_at_0() -> None:
    recorder = Recorder()
    RequestMetering(Meter(recorder))
    codes = {error_code(kind("")) for kind in USUAL_ERRORS}
    assert all(recorder.of(REQUEST_ERRORS, endpoint=CHAT, code=code) == 0 for code in codes)
    assert recorder.of(REQUESTS, endpoint=COMPLETIONS, outcome="client_gone") == 0


def test_nobody_needs_a_meter() -> None:
    service = make_service(says("abc"))
    assert isinstance(service.metering, RequestMetering)

    async def ask() -> int:
        async with http(service) as client:
            return (await client.post(COMPLETIONS, json=ASK)).status_code

    assert asyncio.run(ask()) == 200

"""The least of body, header and server's own limit counts, from arrival on, whatever the router does. About 2 s."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import pytest

from cluster.errors import DeadlineError, RequestError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.deadlines import GRACE_S, HEADER, HEADER_MARGIN_S, Deadline, header_timeout_s
from tests import virtual_time
from tests.deployments.ingress.fakes import TOKENIZER, FakeRouter, http, make_service, says

TEXT = "/v1/completions"
BODY = {"model": "demo", "prompt": "hi"}
T = TypeVar("T")


def timed(make: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, float]:
    """The result, and how many virtual seconds it took."""

    async def run() -> tuple[T, float]:
        result = await make()
        return result, asyncio.get_running_loop().time()

    return virtual_time.run(run())


@pytest.mark.parametrize(
    ("header", "body", "told", "work_s"),
    [
        (None, None, 600, 600),
        (None, 30, 30, 30),
        (None, 1000, 600, 600),
        ("20", None, 20, 20 - HEADER_MARGIN_S),
        ("20", 30, 20, 20 - HEADER_MARGIN_S),
        ("20", 19.9, 19.9, 20 - HEADER_MARGIN_S),
        ("20", 10, 10, 10),
        ("1", None, 1, 0.8),
    ],
)
def test_the_least_counts_and_before_the_header_s_end_there_is_time_to_say_so(
    header: str | None, body: float | None, told: float, work_s: float
) -> None:
    async def make() -> Deadline:
        deadline = Deadline({} if header is None else {HEADER: header}, 600)
        deadline.shorten(body)
        return deadline

    deadline, _ = timed(make)
    assert (deadline.timeout_s, deadline.at_s) == (told, pytest.approx(work_s))
    assert deadline.at_s < deadline.gone_s <= deadline.at_s + GRACE_S
    if header is not None:
        assert deadline.gone_s < float(header)


def test_the_time_left_runs_out() -> None:
    async def run() -> None:
        deadline = Deadline({}, 10)
        await asyncio.sleep(4)
        assert deadline.left_s() == 6
        await asyncio.sleep(6)
        with pytest.raises(DeadlineError, match="did not finish within 10 s"):
            deadline.left_s()

    virtual_time.run(run())


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "86401", "1,5", "1 s"])
def test_a_header_that_is_no_number_of_seconds_is_refused_with_one_sentence(text: str) -> None:
    with pytest.raises(RequestError, match="should be a number of seconds above 0, at most 86400") as caught:
        header_timeout_s({HEADER: text})
    assert caught.value.param == HEADER

    async def ask() -> int:
        async with http(make_service(says("hi"))) as client:
            return (await client.post(TEXT, json=BODY, headers={HEADER: text})).status_code

    assert asyncio.run(ask()) == 400


@pytest.mark.parametrize("value", [0, -1, 86401, "5", True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(value: Any) -> None:
    async def ask() -> tuple[int, Any]:
        async with http(make_service(says("hi"))) as client:
            response = await client.post(TEXT, json=BODY | {"timeout": value})
            return response.status_code, response.json()["error"]["param"]

    assert asyncio.run(ask()) == (400, "timeout")


def test_the_router_is_told_how_long_it_has() -> None:
    service = make_service(says("hi"))

    async def ask() -> int:
        async with http(service) as client:
            return (await client.post(TEXT, json=BODY | {"timeout": 5})).status_code

    assert timed(ask)[0] == 200
    assert isinstance(service.router, FakeRouter)
    assert [request.timeout_s for request in service.router.requests] == [5]


def silent(_: GenerationRequest) -> Iterable[str]:
    yield "hang"


def says_late(_: GenerationRequest) -> Iterable[Exception]:
    yield DeadlineError("The request did not finish within 1.83 s.")


def half(_: GenerationRequest) -> Iterable[TokenChunk | str]:
    yield TokenChunk(0, tuple(TOKENIZER.text_tokens("half")))
    yield "hang"


@pytest.mark.parametrize("how", [{"json": BODY | {"timeout": 2}}, {"json": BODY, "headers": {HEADER: "2"}}])
@pytest.mark.parametrize("script", [silent, says_late], ids=["silent", "says so"])
def test_who_waits_too_long_gets_504_within_a_second_of_the_deadline(how: dict[str, Any], script: Any) -> None:
    """The silent one stands for a request that no router has taken yet."""
    service = make_service(script)

    async def ask() -> tuple[int, str]:
        async with http(service) as client:
            response = await client.post(TEXT, **how)
            return response.status_code, response.json()["error"]["message"]

    answer, took_s = timed(ask)
    assert answer == (504, "The request did not finish within 2 s.")
    assert took_s <= 3
    assert isinstance(service.router, FakeRouter)
    assert len(service.router.cancelled) == (script is silent)


def test_a_stream_whose_time_is_up_ends_with_an_error_event() -> None:
    service = make_service(half)

    async def ask() -> str:
        async with http(service) as client:
            return (await client.post(TEXT, json=BODY | {"timeout": 2, "stream": True})).text

    text, took_s = timed(ask)
    *_, last, rest = text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "deadline_error"
    assert '"half"' in text
    assert took_s <= 3
    assert isinstance(service.router, FakeRouter)
    assert len(service.router.cancelled) == 1


@pytest.mark.parametrize(("headers", "after_s"), [({}, 30), ({HEADER: "4"}, 3.5)])
def test_a_body_that_comes_too_slowly_is_answered_408(headers: dict[str, str], after_s: float) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b'{"model": "demo", "prompt": "'
        while True:
            await asyncio.sleep(1)
            yield b"a"

    async def ask() -> tuple[int, Any]:
        async with http(make_service(says("hi"))) as client:
            response = await client.post(TEXT, content=drip(), headers=headers)
            return response.status_code, response.json()["error"]

    (status, error), took_s = timed(ask)
    assert (status, error["code"]) == (408, "request_timeout")
    assert error["message"] == f"The request body did not arrive within {after_s:g} s."
    assert took_s == pytest.approx(after_s, abs=0.1)


def test_a_body_that_is_slow_but_in_time_is_answered() -> None:
    async def drip() -> AsyncIterator[bytes]:
        for byte in json.dumps(BODY).encode():
            await asyncio.sleep(0.5)
            yield bytes([byte])

    async def ask() -> int:
        async with http(make_service(says("hi"))) as client:
            return (await client.post(TEXT, content=drip())).status_code

    assert timed(ask)[0] == 200

"""Every bound of a request, just kept and just broken: one sentence, at once (2 s)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from deployments.ingress.parsing import MAX_DEPTH, MAX_HEADER_BYTES, MAX_HEADERS
from deployments.ingress.schemas import MAX_LOGIT_BIAS, MAX_MESSAGES, MAX_PROMPTS, MAX_STOP_CHARS, MAX_STOPS
from tests.deployments.ingress.fakes import FakeRouter, http, make_service, says

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
REFUSED_S = 0.1
MAX_BODY = 4 << 20


def nested(levels: int) -> Any:
    """A body in which the innermost of `levels` arrays and objects is an array."""
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    return {"model": "demo", "prompt": "hi", "max_tokens": 2, "metadata": value}


def sized(size: int) -> bytes:
    body = json.dumps({"model": "demo", "prompt": "hi", "max_tokens": 2, "metadata": ""}).encode()
    return body[:-2] + b"x" * (size - len(body)) + b'"}'


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hi", "max_tokens": 2, **fields}


def biases(count: int) -> dict[str, int]:
    return {f"{i % 400:0{3 + i // 400}}": 1 for i in range(count)}


# (what is bounded, a request within it, one beyond it, the status)
BOUNDS: list[tuple[str, Any, Any, int]] = [
    ("nested", nested(MAX_DEPTH), nested(MAX_DEPTH + 1), 400),
    ("nested", nested(MAX_DEPTH), b'{"metadata":' * 100_000, 400),
    ("nested", nested(MAX_DEPTH), json.dumps(nested(900)).encode(), 400),
    ("nested", nested(MAX_DEPTH), json.dumps(nested(900)).replace('"hi"', '"\\ud800"').encode(), 400),
    ("larger", sized(MAX_BODY), sized(MAX_BODY + 1), 413),
    ("stop", text(stop=["x"] * MAX_STOPS), text(stop=["x"] * (MAX_STOPS + 1)), 400),
    ("stop[0]", text(stop="x" * MAX_STOP_CHARS), text(stop="x" * (MAX_STOP_CHARS + 1)), 400),
    ("logit_bias", text(logit_bias=biases(MAX_LOGIT_BIAS)), text(logit_bias=biases(MAX_LOGIT_BIAS + 1)), 400),
    ("prompt", text(prompt=["x"] * MAX_PROMPTS), text(prompt=["x"] * (MAX_PROMPTS + 1)), 400),
]


def post(body: Any, headers: dict[str, str] | None = None, path: str = TEXT) -> tuple[httpx.Response, float, int]:
    """(response, seconds, requests that reached a router)."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    service = make_service(says("x", finish="length"))

    async def call() -> tuple[httpx.Response, float]:
        async with http(service) as client:
            await client.get("/v1/models")  # the first request pays for what is imported late
            start = time.perf_counter()
            response = await client.post(path, content=content, headers=headers)
            return response, time.perf_counter() - start

    response, seconds = asyncio.run(call())
    assert isinstance(service.router, FakeRouter)
    return response, seconds, len(service.router.requests)


def refused(body: Any, status: int, headers: dict[str, str] | None = None, path: str = TEXT) -> str:
    """The error's one sentence. The fastest of three counts: the test machine is shared."""
    tries = [post(body, headers, path) for _ in range(3)]
    response, _, reached = tries[0]
    assert (response.status_code, reached) == (status, 0)
    assert min(seconds for _, seconds, _ in tries) < REFUSED_S
    message: str = response.json()["error"]["message"]
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300
    return message


@pytest.mark.parametrize(("what", "within", "beyond", "status"), BOUNDS, ids=range(len(BOUNDS)))
def test_a_bound_holds_to_the_last_one(what: str, within: Any, beyond: Any, status: int) -> None:
    response, _, reached = post(within)
    assert (response.status_code, reached > 0) == (200, True), response.text
    assert what in refused(beyond, status)


def test_messages_are_counted() -> None:
    many = {"model": "demo", "messages": [USER] * (MAX_MESSAGES + 1)}
    assert str(MAX_MESSAGES) in refused(many, 400, path=CHAT)


def test_headers_are_bounded_in_number_and_size() -> None:
    few = {f"x-{i}": "1" for i in range(MAX_HEADERS - 10)}
    assert post(text(), few)[0].status_code == 200
    assert f"at most {MAX_HEADERS}" in refused(text(), 431, {f"x-{i}": "1" for i in range(MAX_HEADERS + 1)})
    assert post(text(), {"x-large": "x" * (MAX_HEADER_BYTES - 1000)})[0].status_code == 200
    assert f"larger than {MAX_HEADER_BYTES}" in refused(text(), 431, {"x-large": "x" * MAX_HEADER_BYTES})


def test_a_huge_key_is_refused_before_it_is_read() -> None:
    refused(text(), 431, {"authorization": "Bearer " + "x" * (1 << 20)})

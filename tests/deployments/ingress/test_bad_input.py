"""Every bad request gets a 4xx with the field named, at once, and never reaches a router (5 s)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.ingress.service import Service
from tests.deployments.ingress.fakes import FakeRouter, http, make_service, says

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [USER]} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hi"} | fields


def said(*messages: Any) -> dict[str, Any]:
    return chat(messages=list(messages))


# (path, body as JSON value or raw bytes, status, param, word in the message)
CASES: list[tuple[str, Any, int, str | None, str]] = [
    # not a body at all
    (CHAT, b"", 400, None, "JSON"),
    (CHAT, b"{", 400, None, "line 1 column 2"),
    (CHAT, b"[]", 400, None, "object"),
    (CHAT, b'{"model": "\xff"}', 400, None, "UTF-8"),
    (CHAT, b"[" * 100_000, 400, None, "nested"),
    (CHAT, b'{"a":' * 50_000, 400, None, "nested"),
    (CHAT, b"\xef\xbb\xbf{}", 400, None, "JSON"),
    # model
    (CHAT, {"messages": [USER]}, 400, "model", "missing"),
    (CHAT, chat(model=7), 400, "model", "string"),
    (CHAT, chat(model="gpt-4"), 404, "model", "demo"),
    (TEXT, text(model="gpt-4"), 404, "model", "demo"),
    # messages
    (CHAT, {"model": "demo"}, 400, "messages", "missing"),
    (CHAT, chat(messages=None), 400, "messages", "list"),
    (CHAT, chat(messages="hi"), 400, "messages", "list"),
    (CHAT, said(), 400, "messages", "at least 1"),
    (CHAT, said("hi"), 400, "messages[0]", ""),
    (CHAT, said(*[{}] * 200_000), 400, "messages[0].role", "missing"),
    (CHAT, said({"content": "hi"}), 400, "messages[0].role", "missing"),
    (CHAT, said(USER, {"role": "wizard", "content": "hi"}), 400, "messages[1].role", "wizard"),
    (CHAT, said(USER, {"role": "tool", "content": "hi"}), 400, "messages[1].role", "tool"),
    (CHAT, said(USER, USER, {"role": "system", "content": "x"}, USER), 400, "messages[2].role", "first"),
    (CHAT, said({"role": "user"}), 400, "messages[0].content", "missing"),
    (CHAT, said({"role": "user", "content": None}), 400, "messages[0].content", "string"),
    (CHAT, said({"role": "user", "content": 5}), 400, "messages[0].content", "string"),
    (CHAT, said({"role": "user", "content": []}), 400, "messages[0].content", "at least 1"),
    (CHAT, said({"role": "user", "content": ["hi"]}), 400, "messages[0].content[0]", ""),
    (CHAT, said({"role": "user", "content": [{"type": "text"}]}), 400, "messages[0].content[0].text", "missing"),
    (
        CHAT,
        said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        400,
        "messages[0].content[0].type",
        "text",
    ),
    (CHAT, said({"role": "user", "content": "hi", "mood": "bad"}), 400, "messages[0].mood", "Unknown"),
    (CHAT, said({"role": "assistant", "content": "x", "tool_calls": [{}]}), 400, "messages[0].tool_calls", "support"),
    (
        CHAT,
        b'{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}',
        400,
        "messages[0].content",
        "surrogate",
    ),
    (CHAT, said({"role": "user", "content": "word " * 300}), 400, "messages", "256"),
    (CHAT, said({"role": "user", "content": "x" * 1_000_000}), 400, "messages", "at least"),
    (CHAT, said(*[USER] * 2_000), 400, "messages", "256"),
    # prompt
    (TEXT, {"model": "demo"}, 400, "prompt", "missing"),
    (TEXT, text(prompt=None), 400, "prompt", "string"),
    (TEXT, text(prompt=5), 400, "prompt", "string"),
    (TEXT, text(prompt={"a": 1}), 400, "prompt", "string"),
    (TEXT, text(prompt=""), 400, "prompt", "empty"),
    (TEXT, text(prompt=[]), 400, "prompt", "empty"),
    (TEXT, text(prompt=[[]]), 400, "prompt[0]", "empty"),
    (TEXT, text(prompt=["a", ""]), 400, "prompt[1]", "empty"),
    (TEXT, text(prompt=["a", 5]), 400, "prompt[1]", "string"),
    (TEXT, text(prompt=[7, "a"]), 400, "prompt[1]", "token id"),
    (TEXT, text(prompt=[True]), 400, "prompt[0]", "token id"),
    (TEXT, text(prompt=[7.0]), 400, "prompt[0]", ""),
    (TEXT, text(prompt=[7, 400]), 400, "prompt[1]", "399"),
    (TEXT, text(prompt=[7, -1]), 400, "prompt[1]", "399"),
    (TEXT, text(prompt=[7, 10**30]), 400, "prompt[1]", "399"),
    (TEXT, text(prompt=[[7], [7, 400]]), 400, "prompt[1][1]", "399"),
    (TEXT, text(prompt=["a"] * 129), 400, "prompt", "128"),
    (TEXT, text(prompt=["a"] * 100, n=2), 400, "n", "128"),
    (TEXT, text(prompt=[7] * 256), 400, "prompt", "256"),
    (TEXT, text(prompt=["a", "word " * 300]), 400, "prompt[1]", "256"),
    (TEXT, b'{"model":"demo","prompt":"\\udfff"}', 400, "prompt", "surrogate"),
    # length
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "greater"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens", "greater"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens", "integer"),
    (CHAT, chat(max_tokens="5"), 400, "max_tokens", "integer"),
    (CHAT, chat(max_tokens=True), 400, "max_tokens", "integer"),
    (CHAT, chat(max_tokens=256), 400, "max_tokens", "context"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens", "context"),
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"n":' + b"9" * 9000 + b"}", 400, "n", "16"),
    (CHAT, chat(max_completion_tokens=0), 400, "max_completion_tokens", "greater"),
    (CHAT, chat(max_completion_tokens=999), 400, "max_completion_tokens", "context"),
    (CHAT, chat(max_completion_tokens=5, max_tokens=5), 400, "max_tokens", "both"),
    (TEXT, text(max_tokens=256), 400, "max_tokens", "context"),
    (TEXT, text(max_completion_tokens=5), 400, "max_completion_tokens", "Unknown"),
    # sampling
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"temperature":NaN}', 400, "temperature", "fin"),
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"top_p":Infinity}', 400, "top_p", ""),
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"min_p":-Infinity}', 400, "min_p", ""),
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"temperature":1e999}', 400, "temperature", ""),
    (
        CHAT,
        b'{"model":"demo","messages":[{"role":"user","content":"a"}],"logit_bias":{"5":NaN}}',
        400,
        "logit_bias.5",
        "",
    ),
    (CHAT, chat(temperature=-0.1), 400, "temperature", "greater"),
    (CHAT, chat(temperature=2.1), 400, "temperature", "less"),
    (CHAT, chat(temperature="hot"), 400, "temperature", "hot"),
    (CHAT, chat(temperature=True), 400, "temperature", "number"),
    (CHAT, chat(temperature=[1]), 400, "temperature", "number"),
    (CHAT, chat(top_p=0), 400, "top_p", "greater"),
    (CHAT, chat(top_p=1.1), 400, "top_p", "less"),
    (CHAT, chat(top_k=-2), 400, "top_k", "greater"),
    (CHAT, chat(top_k=1.5), 400, "top_k", "integer"),
    (CHAT, chat(min_p=1.1), 400, "min_p", "less"),
    (CHAT, chat(seed=2**63), 400, "seed", "less"),
    (CHAT, chat(seed="x"), 400, "seed", "integer"),
    (CHAT, chat(n=0), 400, "n", "greater"),
    (CHAT, chat(n=17), 400, "n", "16"),
    (CHAT, chat(presence_penalty=2.1), 400, "presence_penalty", "less"),
    (CHAT, chat(frequency_penalty=-2.1), 400, "frequency_penalty", "greater"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "greater"),
    (CHAT, chat(repetition_penalty=1e-40), 400, "repetition_penalty", "greater"),
    (CHAT, chat(logit_bias=[1]), 400, "logit_bias", "dict"),
    (CHAT, chat(logit_bias={"400": 1}), 400, "logit_bias.400", "399"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias.-1", "399"),
    (CHAT, chat(logit_bias={"five": 1}), 400, "logit_bias.five", "399"),
    (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias.5", "100"),
    (CHAT, chat(logit_bias={"5": "x"}), 400, "logit_bias.5", "number"),
    (CHAT, chat(logit_bias={str(i): "x" for i in range(100_000)}), 400, "logit_bias", "1024"),
    # ends
    (CHAT, chat(stop=5), 400, "stop", "list"),
    (CHAT, chat(stop=""), 400, "stop[0]", "at least 1"),
    (CHAT, chat(stop=["a", ""]), 400, "stop[1]", "at least 1"),
    (CHAT, chat(stop=["a", 5]), 400, "stop[1]", "string"),
    (CHAT, chat(stop=["a"] * 5), 400, "stop", "4"),
    (CHAT, chat(stop="x" * 2000), 400, "stop[0]", "1024"),
    (CHAT, chat(stop_token_ids=[400]), 400, "stop_token_ids[0]", "399"),
    (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "greater"),
    (CHAT, chat(stop_token_ids="5"), 400, "stop_token_ids", "list"),
    (CHAT, chat(ignore_eos="yes"), 400, "ignore_eos", "boolean"),
    # what comes back
    (CHAT, chat(logprobs=5), 400, "logprobs", "boolean"),
    (CHAT, chat(top_logprobs=5), 400, "top_logprobs", "logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "20"),
    (TEXT, text(logprobs=True), 400, "logprobs", "integer"),
    (TEXT, text(logprobs=21), 400, "logprobs", "20"),
    (CHAT, chat(stream="yes"), 400, "stream", "boolean"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "stream"),
    (CHAT, chat(stream=True, stream_options={"include_usage": 1}), 400, "stream_options.include_usage", "boolean"),
    (CHAT, chat(stream=True, stream_options={"color": 1}), 400, "stream_options.color", "Unknown"),
    # not supported, never silently ignored
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (CHAT, chat(tool_choice="auto"), 400, "tool_choice", "not supported"),
    (CHAT, chat(functions=[{}]), 400, "functions", "not supported"),
    (CHAT, chat(function_call="auto"), 400, "function_call", "not supported"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities", "not supported"),
    (CHAT, chat(audio={"voice": "x"}), 400, "audio", "not supported"),
    (CHAT, chat(prediction={}), 400, "prediction", "not supported"),
    (CHAT, chat(reasoning_effort="high"), 400, "reasoning_effort", "not supported"),
    (CHAT, chat(web_search_options={}), 400, "web_search_options", "not supported"),
    (TEXT, text(echo=True), 400, "echo", "not supported"),
    (TEXT, text(suffix="x"), 400, "suffix", "not supported"),
    (TEXT, text(best_of=2), 400, "best_of", "not supported"),
    (CHAT, chat(tempurature=1), 400, "tempurature", "Unknown"),
    (CHAT, chat(**{f"x{i}": 1 for i in range(100_000)}), 400, "x0", "Unknown"),
    (CHAT, said({"role": "user", "content": "a"} | {f"x{i}": 1 for i in range(100_000)}), 400, "messages[0].x0", "Unk"),
    (CHAT, said(*[USER] * 5_000), 400, "messages", "4096"),
    (CHAT, chat(user=5), 400, "user", "string"),
    (CHAT, b'{"model":"demo","messages":[{"role":"user","content":"a"}],"\\ud800":1}', 400, "\ud800", "surrogate"),
    (
        CHAT,
        b'{"model":"demo","messages":[{"role":"user","content":"a"}],"stop":["\\uDFFF"]}',
        400,
        "stop[0]",
        "surrogate",
    ),
]


def post(service: Service, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, float]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def call() -> tuple[int, Any, float]:
        async with http(service) as client:
            start = time.perf_counter()
            response = await client.post(path, content=content, headers=headers)
            return response.status_code, response.json(), time.perf_counter() - start

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "word"), CASES, ids=[f"{i}-{case[3]}" for i, case in enumerate(CASES)]
)
def test_bad_request_is_refused_by_name(path: str, body: Any, status: int, param: str | None, word: str) -> None:
    service = make_service(says("never"))
    got, answer, seconds = post(service, path, body)
    error = answer["error"]
    assert set(answer) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (got, error["param"]) == (status, param)
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert "Traceback" not in error["message"]
    assert isinstance(service.router, FakeRouter)
    assert service.router.requests == []
    assert seconds < 1.0  # 0.1 s on an idle machine; the test machine is shared


def test_prompt_too_long_has_openai_s_code() -> None:
    _, answer, _ = post(make_service(says("never")), CHAT, said({"role": "user", "content": "word " * 300}))
    assert answer["error"]["code"] == "context_length_exceeded"


def test_large_body_is_refused_by_its_declared_length_without_being_read() -> None:
    chunks_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal chunks_read
        for _ in range(160):
            chunks_read += 1
            yield b" " * 65536

    service = make_service(says("never"))

    async def call(headers: dict[str, str]) -> int:
        nonlocal chunks_read
        chunks_read = 0
        async with http(service) as client:
            response = await client.post(CHAT, content=body(), headers=headers)
            assert response.json()["error"]["code"] == "body_too_large"
            return response.status_code

    assert asyncio.run(call({"content-length": str(160 * 65536)})) == 413
    assert chunks_read == 0
    assert asyncio.run(call({})) == 413
    assert chunks_read == 65  # 4 MiB and the chunk that went over


def test_ten_megabytes_are_refused_quickly() -> None:
    status, _, seconds = post(make_service(says("never")), CHAT, chat(user="x" * 10_000_000))
    assert status == 413
    assert seconds < 1.0


def test_compressed_body_is_refused_clearly() -> None:
    status, answer, _ = post(make_service(says("never")), CHAT, b"\x1f\x8b", {"content-encoding": "gzip"})
    assert (status, answer["error"]["code"]) == (400, "invalid_encoding")


def test_too_long_session_header_is_refused() -> None:
    status, answer, _ = post(make_service(says("never")), CHAT, chat(), {"x-session-id": "x" * 1000})
    assert (status, answer["error"]["param"]) == (400, "x-session-id")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/redoc", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", TEXT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("POST", CHAT + "/", 404, "unknown_url"),
    ],
)
def test_unknown_routes_and_methods_answer_in_openai_s_shape(method: str, path: str, status: int, code: str) -> None:
    async def call() -> None:
        async with http(make_service(says("never"))) as client:
            response = await client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert (status == 405) == ("allow" in response.headers)

    asyncio.run(call())

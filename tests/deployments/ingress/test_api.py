"""The API as the real `openai` client sees it, streaming and not, over a fake router (3 s)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest

from cluster.errors import (
    DeadlineError,
    EngineError,
    ExpertsUnavailableError,
    OverloadedError,
    RequestError,
)
from deployments.generation import GenerationRequest, TokenChunk, TokenLogprob
from deployments.ingress.api import create_app
from deployments.ingress.auth import Authenticator, KeyFile
from deployments.ingress.clients import Health
from deployments.ingress.keys import KeyRecord, digest_of
from deployments.ingress.service import Service
from tests.deployments.ingress.fakes import EOS, TOKENIZER, FakeCluster, FakeRouter, Script, http, make_service, says

T = TypeVar("T")
CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "你好"}]
LONG = "The fox 你好 👩‍👩‍👧‍👦 café"


def use(service: Service, call: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    """Run `call` with a client whose transport is the application itself."""

    async def run() -> T:
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(service)))
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="key", http_client=transport, max_retries=0
        ) as client:
            return await call(client)

    return asyncio.run(run())


def chat(service: Service, **fields: Any) -> Any:
    return use(service, lambda c: c.chat.completions.create(model="demo", messages=MESSAGES, **fields))


def complete(service: Service, **fields: Any) -> Any:
    return use(service, lambda c: c.completions.create(**({"model": "demo", "prompt": "hi"} | fields)))


def chunks(service: Service, kind: str = "chat", **fields: Any) -> list[Any]:
    async def call(client: openai.AsyncOpenAI) -> list[Any]:
        create: Any = client.chat.completions.create if kind == "chat" else client.completions.create
        asked = {"messages": MESSAGES} if kind == "chat" else {"prompt": "hi"}
        return [chunk async for chunk in await create(**({"model": "demo", "stream": True} | asked | fields))]

    return use(service, call)


def router(service: Service) -> FakeRouter:
    assert isinstance(service.router, FakeRouter)
    return service.router


def events(service: Service, path: str, body: dict[str, Any]) -> list[str]:
    async def call() -> list[str]:
        async with http(service) as client:
            response = await client.post(path, json=body)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            return response.text.split("\n\n")

    lines = asyncio.run(call())
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


# What is sent to the router


def test_chat_goes_through_the_template_and_defaults_are_openai_s() -> None:
    service = make_service(says("hi"))
    chat(service)
    [request] = router(service).requests
    tokens = TOKENIZER.text_tokens("<s><|user|>你好<|assistant|>")
    assert request.tokens == tuple(tokens)
    assert request.prompt_tokens == len(tokens)
    assert request.timeout_s == pytest.approx(600, abs=30)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.n, sampling.temperature, sampling.top_p) == (256 - len(tokens), 1, 1.0, 1.0)
    assert (sampling.top_k, sampling.min_p, sampling.logprobs, sampling.ignore_eos) == (0, 0.0, None, False)


def test_every_sampling_field_reaches_the_router() -> None:
    service = make_service(says("hi"))
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "stop_token_ids": [7], "ignore_eos": True}
    chat(
        service,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.25,
        seed=-5,
        n=2,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=3,
        extra_body=extra,
    )
    sampling = router(service).requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.25, -5)
    assert (sampling.n, sampling.presence_penalty, sampling.frequency_penalty) == (2, 1, -1)
    assert (sampling.logit_bias, sampling.logprobs, sampling.top_k, sampling.min_p) == ({5: -100.0}, 3, 5, 0.1)
    assert (sampling.repetition_penalty, sampling.stop_token_ids, sampling.ignore_eos) == (1.5, (7,), True)


def test_missing_seeds_are_drawn_and_differ() -> None:
    service = make_service(says("hi"))
    chat(service)
    chat(service)
    first, second = (request.sampling.seed for request in router(service).requests)
    assert first != second
    assert 0 <= first < 2**63


def test_equal_prompts_of_one_request_are_sampled_independently_where_no_seed_is_asked_for() -> None:
    service = make_service(says("hi"))
    complete(service, prompt=["same", "same", "same"])
    assert len({request.sampling.seed for request in router(service).requests}) == 3


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    service = make_service(says("hi"))
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    harmless = {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x", "stop": None}
    chat(service, extra_body=neutral | harmless | {"logit_bias": None, "n": None, "top_k": -1, "temperature": 0})
    echoed = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    use(service, lambda c: c.chat.completions.create(model="demo", messages=[*MESSAGES, echoed]))
    complete(service, echo=False, suffix="", best_of=1)
    assert [request.sampling.top_k for request in router(service).requests] == [0, 0, 0]


def test_developer_becomes_system_and_text_parts_become_lines() -> None:
    service = make_service(says("hi"))
    messages: Any = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    use(service, lambda c: c.chat.completions.create(model="demo", messages=messages))
    expected = TOKENIZER.text_tokens("<s><|system|>be kind<|user|>a\nb<|assistant|>")
    assert router(service).requests[0].tokens == tuple(expected)


def test_session_comes_from_the_header_or_else_the_user() -> None:
    service = make_service(says("hi"))
    chat(service)
    chat(service, user="u")
    chat(service, user="u", extra_headers={"x-session-id": "s"})
    assert router(service).sessions == [None, "u", "s"]


def test_nul_characters_and_control_characters_are_text() -> None:
    service = make_service(says("hi"))
    complete(service, prompt="a\x00\x1b\u2028b")
    assert TOKENIZER.decode(router(service).requests[0].tokens) == "a\x00\x1b\u2028b"


def test_prompts_as_strings_and_token_lists_each_become_a_request() -> None:
    for prompt, expected in (
        ("hi", [TOKENIZER.text_tokens("hi")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["a", "b"], [TOKENIZER.text_tokens("a"), TOKENIZER.text_tokens("b")]),
    ):
        service = make_service(says("x"))
        answer = complete(service, prompt=prompt, n=2, seed=1)
        assert [list(request.tokens) for request in router(service).requests] == expected
        assert {request.sampling.seed for request in router(service).requests} == {1}
        assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))


# What comes back


def test_chat_answer_is_whole_and_counts_truly() -> None:
    answer = chat(make_service(says(LONG, cached=2)))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", LONG, "stop")
    assert choice.message.refusal is None
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "demo", "fp_test")
    prompt, tokens = len(TOKENIZER.text_tokens("<s><|user|>你好<|assistant|>")), len(TOKENIZER.text_tokens(LONG))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, tokens + 1)  # and the end token
    assert answer.usage.total_tokens == prompt + tokens + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_finish_reason_length_is_told() -> None:
    service = make_service(says("hi there", finish="length"))
    answer = chat(service)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == len(TOKENIZER.text_tokens("hi there"))


def test_stream_joins_to_the_same_text_with_role_first_and_reason_last() -> None:
    stream = chunks(make_service(says(LONG)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == LONG
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in stream)
    assert stream[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in stream] == [None] * (len(stream) - 1) + ["stop"]
    assert len({chunk.id for chunk in stream}) == 1
    assert {chunk.object for chunk in stream} == {"chat.completion.chunk"}


def test_stream_tells_usage_last_when_asked() -> None:
    stream = chunks(make_service(says("hi", cached=3)), stream_options={"include_usage": True})
    assert stream[-1].choices == []
    assert stream[-1].usage.completion_tokens == len(TOKENIZER.text_tokens("hi")) + 1
    assert stream[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in stream[:-1])


def test_events_on_the_wire_have_the_fields_clients_look_for() -> None:
    *data, done = events(make_service(says("hi")), CHAT, {"model": "demo", "messages": MESSAGES, "stream": True})
    assert done == "[DONE]"
    first, middle, last = (json.loads(data[i])["choices"][0] for i in (0, 1, -1))
    assert first == {"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}, "finish_reason": None}
    assert middle["finish_reason"] is None
    assert last == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert "usage" not in json.loads(data[0])


def test_choices_are_kept_apart() -> None:
    def script(_request: GenerationRequest) -> Iterable[TokenChunk]:
        for choice, text in enumerate(("first", "second", "third")):
            yield TokenChunk(choice, tuple(TOKENIZER.text_tokens(text)), None, "length")

    answer = chat(make_service(script), n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "first"), (1, "second"), (2, "third")]
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks(make_service(script), n=3):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "first", 1: "second", 2: "third"}


def test_completion_streams_text_and_finish_reason() -> None:
    stream = chunks(make_service(says(LONG)), "text")
    assert "".join(chunk.choices[0].text for chunk in stream) == LONG
    assert [chunk.choices[0].finish_reason for chunk in stream][-2:] == [None, "stop"]
    assert complete(make_service(says(LONG))).choices[0].text == LONG


@pytest.mark.parametrize("streaming", [False, True])
def test_stop_string_ends_text_usage_and_the_work(streaming: bool) -> None:
    """Token by token "one ST", "OP two": the stop string crosses a border, and the router would go on for ever."""
    pieces = ("one", " S", "TO", "P", " two")

    def script(_request: GenerationRequest) -> Iterable[TokenChunk | str]:
        for piece in pieces:
            for token in TOKENIZER.text_tokens(piece):
                yield TokenChunk(0, (token,))
        yield "hang"

    used = sum(len(TOKENIZER.text_tokens(piece)) for piece in pieces[:-1])
    service = make_service(script)
    if streaming:
        *stream, usage = chunks(service, stop="STOP", stream_options={"include_usage": True})
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert stream[-1].choices[0].finish_reason == "stop"
        assert usage.usage.completion_tokens == used
    else:
        answer = chat(service, stop=["STOP", "never"])
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == used
    assert text == "one "
    assert router(service).cancelled == [router(service).requests[0].request_id]


def logprob_script(text: str) -> Script:
    def script(_request: GenerationRequest) -> Iterable[TokenChunk]:
        for token in TOKENIZER.text_tokens(text):
            top = ((token, -0.5), (5, float("-inf")))
            yield TokenChunk(0, (token,), (TokenLogprob(token, -0.5, top),))
        yield TokenChunk(0, (EOS,), (TokenLogprob(EOS, -0.1, ()),), "stop")

    return script


def test_chat_logprobs_name_every_token_and_its_bytes() -> None:
    service = make_service(logprob_script(LONG))
    content = chat(service, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == LONG
    assert content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]
    halves = [entry.token for entry in content if entry.token.startswith("bytes:")]
    assert halves  # the emoji is spread over several tokens
    streamed = chunks(make_service(logprob_script(LONG)), logprobs=True, top_logprobs=2)
    parts = [part.choices[0].logprobs.content for part in streamed if part.choices[0].logprobs]
    assert [entry for part in parts for entry in part] == content


def test_completion_logprobs_have_offsets_into_the_text() -> None:
    choice = complete(make_service(logprob_script("The fox 你好")), logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    assert logprobs.top_logprobs[0][logprobs.tokens[0]] == -0.5
    assert complete(make_service(says("x"))).choices[0].logprobs is None


def test_tokens_inside_a_stop_string_have_no_logprobs() -> None:
    service = make_service(logprob_script("The fox"))
    content = chat(service, logprobs=True, stop=" fox").choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content) == b"The"


# Errors of the router


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("too odd", "messages"), 400, "invalid_request_error"),
        (OverloadedError("full", 7), 429, "overloaded_error"),
        (ExpertsUnavailableError("experts-2 is gone"), 503, "experts_unavailable"),
        (DeadlineError("too late"), 504, "deadline_error"),
        (EngineError("a step failed"), 500, "engine_error"),
        (RuntimeError("secret /path"), 500, "server_error"),
    ],
)
def test_errors_before_the_first_token_have_their_own_status(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    async def call() -> httpx.Response:
        async with http(make_service(lambda _: [error])) as client:
            return await client.post(CHAT, json={"model": "demo", "messages": MESSAGES, "stream": stream})

    response = asyncio.run(call())
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


def test_error_in_mid_stream_is_the_last_event() -> None:
    def script(_request: GenerationRequest) -> Iterable[TokenChunk | Exception]:
        yield TokenChunk(0, tuple(TOKENIZER.text_tokens("one")))
        yield ExpertsUnavailableError("experts-2 is gone")

    *_, last = events(make_service(script), CHAT, {"model": "demo", "messages": MESSAGES, "stream": True})
    assert json.loads(last)["error"]["type"] == "experts_unavailable"
    with pytest.raises(openai.APIError, match="experts-2 is gone"):
        chunks(make_service(script))


def test_stream_of_the_router_that_ends_early_is_an_error() -> None:
    with pytest.raises(openai.InternalServerError, match="before every choice"):
        chat(make_service(lambda _: [TokenChunk(0, (5,))]))


# The other routes


def test_models_are_listed_and_looked_up() -> None:
    service = make_service(says("x"))

    async def call(client: openai.AsyncOpenAI) -> tuple[list[str], str]:
        return [model.id async for model in client.models.list()], (await client.models.retrieve("demo")).object

    assert use(service, call) == (["demo"], "model")


@pytest.mark.parametrize(
    ("health", "status", "missing"),
    [
        (Health(), 200, []),
        (Health(("router", "experts-2")), 503, ["router", "experts-2"]),
        (RuntimeError("gone"), 503, ["directory"]),
    ],
)
def test_health_says_what_is_missing(health: Health | Exception, status: int, missing: list[str]) -> None:
    async def call() -> httpx.Response:
        async with http(make_service(says("x"), cluster=FakeCluster(health))) as client:
            return await client.get("/health")

    response = asyncio.run(call())
    assert (response.status_code, response.json()["missing"]) == (status, missing)


def test_why_something_is_missing_is_told_to_those_who_may_see_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(KeyRecord("admin", digest_of("admin-key")).line())
    health = Health(("experts-2",), reasons={"experts-2": "a shard is missing"})

    async def told(auth: Authenticator, key: str) -> object:
        async with http(make_service(says("x"), cluster=FakeCluster(health), auth=auth)) as client:
            response = await client.get("/health", headers={"authorization": f"Bearer {key}"})
        return response.json().get("reasons")

    guarded = Authenticator(None, KeyFile(tmp_path / "admin"))
    assert asyncio.run(told(Authenticator(), "")) == dict(health.reasons)
    assert asyncio.run(told(guarded, "admin-key")) == dict(health.reasons)
    assert asyncio.run(told(guarded, "other-key")) is None


def test_what_is_wrong_besides_leaves_the_status_and_says_why_to_those_who_may_see_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(KeyRecord("admin", digest_of("admin-key")).line())
    guarded = Authenticator(None, KeyFile(tmp_path / "admin"))
    sentence = "p.yaml as it is now is not in force: budget: wrong."
    service = make_service(says("x"), cluster=FakeCluster(Health(degraded={"policy_file": sentence})), auth=guarded)

    async def told(key: str) -> tuple[int, dict[str, object]]:
        async with http(service) as client:
            response = await client.get("/health", headers={"authorization": f"Bearer {key}"})
        return response.status_code, response.json()

    public = {"status": "ok", "missing": [], "degraded": ["policy_file"]}
    assert asyncio.run(told("other-key")) == (200, public)
    assert asyncio.run(told("admin-key")) == (200, {**public, "reasons": {"policy_file": sentence}})


def test_keys_guard_everything_but_health(tmp_path: Path) -> None:
    for name in ("api", "admin"):
        (tmp_path / name).write_text(KeyRecord(name, digest_of(f"{name}-key")).line())
    auth = Authenticator(KeyFile(tmp_path / "api"), KeyFile(tmp_path / "admin"))

    async def statuses(key: str | None) -> list[int]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with http(make_service(says("x"), auth=auth)) as client:
            client.headers.update(headers)
            paths = ("/health", "/v1/models", "/v1/models/demo", "/openapi.json", "/v1/cluster", "/v1/cluster/loads")
            responses = [await client.get(path) for path in paths]
            for path, body in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "a"})):
                responses.append(await client.post(path, json={"model": "demo"} | body))
        assert all(("www-authenticate" in r.headers) == (r.status_code == 401) for r in responses)
        return [response.status_code for response in responses]

    assert asyncio.run(statuses(None)) == [200] + [401] * 7
    assert asyncio.run(statuses("wrong")) == [200] + [401] * 7
    assert asyncio.run(statuses("api-key")) == [200, 200, 200, 200, 401, 401, 200, 200]
    assert asyncio.run(statuses("admin-key")) == [200] * 8


def test_cluster_view_is_the_snapshot() -> None:
    async def call() -> Any:
        async with http(make_service(says("x"))) as client:
            return (await client.get("/v1/cluster")).json()

    assert asyncio.run(call()) == {"model": "demo", "epoch": ["a", 3], "groups": []}

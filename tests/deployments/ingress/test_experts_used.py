"""The header that asks for experts: chunks and whole answers that have them, held-back text, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from cluster.errors import RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.experts_used import EXPERTS_HEADER
from deployments.ingress.resume import ResumingRouter
from tests.deployments.ingress.fakes import TOKENIZER, FakeRouter, http, make_service

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "demo", "prompt": "x"}


def script(request: GenerationRequest) -> Iterable[TokenChunk]:
    """`hello`, whose n-th token goes to expert n of layer 3, and to expert 9 of layer 10."""
    tokens = TOKENIZER.text_tokens("hello")
    for i, token in enumerate(tokens):
        finish = "length" if i == len(tokens) - 1 else None
        experts = {3: (i,), 10: (9,)} if request.show_experts else None
        yield TokenChunk(request.choice, (token,), None, finish, experts=experts)  # type: ignore[arg-type]


def ask(path: str, body: dict[str, Any], header: str | None = "true", router: Any = None) -> httpx.Response:
    async def story() -> httpx.Response:
        changes = {} if router is None else {"router": router}
        async with http(make_service(script, **changes)) as client:
            headers = {} if header is None else {EXPERTS_HEADER: header}
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(story())


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_every_chunk_of_a_stream_has_the_experts_of_its_tokens() -> None:
    chunks = chunks_of(ask("/v1/completions", TEXT | {"stream": True}))
    assert [chunk["experts"] for chunk in chunks] == [{"3": [i], "10": [9]} for i in range(len(chunks))]
    chats = chunks_of(ask("/v1/chat/completions", CHAT | {"stream": True}))
    said = [chunk["experts"]["3"] for chunk in chats if "experts" in chunk]
    assert said == [[i] for i in range(len(chunks))]
    assert "experts" not in chats[0], "the role costs no token"
    # OpenAI's own client keeps the key.
    assert ChatCompletionChunk.model_validate(chats[1]).model_extra == {"experts": chats[1]["experts"]}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
def test_a_whole_answer_has_all_of_them(path: str, body: dict[str, Any]) -> None:
    answer = ask(path, body).json()
    count = answer["usage"]["completion_tokens"]
    assert answer["experts"] == {"3": list(range(count)), "10": [9]}


@pytest.mark.parametrize("header", [None, "false"])
def test_who_does_not_ask_gets_the_plain_answer(header: str | None) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        assert "experts" not in ask(path, body, header).json()
        assert not any("experts" in chunk for chunk in chunks_of(ask(path, body | {"stream": True}, header)))


def test_experts_of_text_that_is_held_back_come_with_the_next_chunk() -> None:
    # Each token could begin the stop string, so nothing is shown before the last one.
    chunks = chunks_of(ask("/v1/completions", TEXT | {"stream": True, "stop": "hello!"}))
    told = sorted({i for chunk in chunks for i in chunk["experts"]["3"]})
    assert len(chunks) < len(told) or len(told) == 1
    assert told == list(range(len(TOKENIZER.text_tokens("hello"))))


def test_a_header_that_says_something_else_is_refused() -> None:
    response = ask("/v1/completions", TEXT, "yes")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == EXPERTS_HEADER


def test_they_go_on_when_another_router_takes_over() -> None:
    lost = False

    def dying(request: GenerationRequest) -> Iterable[TokenChunk | Exception]:
        nonlocal lost
        rest = list(script(request))[len(request.tokens) - request.prompt_tokens :]
        if lost:
            yield from rest
        else:
            lost = True
            yield rest[0]
            yield RouterStoppingError("gone")

    router = ResumingRouter(FakeRouter(dying), clock=lambda: 0.0, pause_s=0.0)
    answer = Completion.model_validate(ask("/v1/completions", TEXT, router=router).json())
    assert lost
    assert answer.choices[0].text == "hello"
    assert answer.model_extra is not None
    assert answer.model_extra["experts"]["3"] == list(range(len(TOKENIZER.text_tokens("hello"))))

"""An answer holds the tokens of one model and names it, though routers of two answer meanwhile. Milliseconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.errors import RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from tests.deployments.ingress.fakes import Script, http, make_service, says

OLD, NEW = "0d" * 32, "ab" * 32
TWO = {"model": "demo", "prompt": ["a", "b"], "max_tokens": 50}
SAYS = {OLD: "old words", NEW: "new words"}


def model_of(*digests: str, gone: str = "") -> Script:
    """Prompt i is answered by the i-th model, but for one that asks for a model itself. Nobody has `gone` any more."""

    def script(request: GenerationRequest) -> Iterable[TokenChunk | Exception | str]:
        prompt = int(request.request_id.partition("/")[0].rpartition("-")[2])
        digest = request.digest or digests[prompt]
        if request.digest and request.digest == gone:
            yield RouterStoppingError("No router serves the model any more.")
        for i, chunk in enumerate(says(SAYS[digest])(request)):
            assert isinstance(chunk, TokenChunk)
            yield chunk if i else replace(chunk, digest=digest)

    return script


def post(service: Any, path: str, body: dict[str, Any]) -> httpx.Response:
    async def story() -> httpx.Response:
        async with http(service) as client:
            return await client.post(path, json=body)

    return asyncio.run(story())


@pytest.mark.parametrize(("first", "second"), [(OLD, NEW), (NEW, OLD)])
def test_a_prompt_that_another_model_begins_is_asked_again_of_the_first_one(first: str, second: str) -> None:
    service = make_service(model_of(first, second))
    answer = post(service, "/v1/completions", TWO).json()
    assert [choice["text"] for choice in answer["choices"]] == [SAYS[first]] * 2
    assert answer["system_fingerprint"] == f"xs-{first[:12]}"
    router: Any = service.router
    _, before, again = router.requests
    assert (again.digest, again.accepted, again.request_id) == (first, True, f"{before.request_id}/again")
    assert (again.tokens, again.sampling, again.prompt_tokens) == (before.tokens, before.sampling, before.prompt_tokens)
    assert again.timeout_s <= before.timeout_s
    assert router.cancelled == [before.request_id]


def test_every_prompt_is_asked_once_where_one_model_answers() -> None:
    service = make_service(model_of(NEW, NEW))
    answer = post(service, "/v1/completions", TWO | {"n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == [SAYS[NEW]] * 4
    router: Any = service.router
    assert [request.digest for request in router.requests] == ["", ""]
    assert not router.cancelled


def test_where_the_first_model_has_gone_meanwhile_the_other_one_answers_everything() -> None:
    service = make_service(model_of(OLD, NEW, gone=OLD))
    answer = post(service, "/v1/completions", TWO).json()
    assert [choice["text"] for choice in answer["choices"]] == [SAYS[NEW]] * 2
    assert answer["system_fingerprint"] == f"xs-{NEW[:12]}"
    router: Any = service.router
    assert [request.digest for request in router.requests] == ["", "", OLD, NEW, NEW]


def test_a_stream_of_which_something_was_given_away_ends_with_the_reason() -> None:
    lines = post(make_service(model_of(OLD, NEW, gone=OLD)), "/v1/completions", TWO | {"stream": True}).text
    assert '"router_stopping"' in lines
    assert SAYS[NEW] not in lines


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_every_chunk_of_a_stream_names_the_model_that_answers(path: str, prompt: dict[str, Any]) -> None:
    asked = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}} | prompt
    lines = post(make_service(model_of(OLD, NEW)), path, asked).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(events) > 3
    assert {event["system_fingerprint"] for event in events} == {f"xs-{OLD[:12]}"}

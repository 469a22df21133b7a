"""What the log says of each request: how it ended, what it used, how long it took, and under which id (1 s)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import EngineError, ExpertsUnavailableError, RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.request_ids import HEADER
from deployments.ingress.responses import TextAnswer
from deployments.ingress.resume import ResumingRouter
from tests.deployments.ingress.fakes import TOKENIZER, FakeRouter, Script, http, make_service, says

ID = "grep-me"
PROMPT = [5, 6, 7, 8, 9]
SAID = "hello"
TOKENS = len(TOKENIZER.text_tokens(SAID))
TEXT = "/v1/completions"


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What the Ingress logs, whoever has set up logging before."""
    found: list[logging.LogRecord] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    ours, watch = logging.getLogger("deployments.ingress"), Watch()
    level = ours.level
    ours.addHandler(watch)
    ours.setLevel(logging.DEBUG)
    yield found
    ours.removeHandler(watch)
    ours.setLevel(level)


def post(script: Script, leave: bool = False, **fields: Any) -> int:
    """The status of one completion; leave: hang up once the router has it."""
    service = make_service(script)

    async def call() -> int:
        body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, **fields}
        async with http(service) as client:
            asked = asyncio.create_task(client.post(TEXT, json=body, headers={HEADER: ID}))
            if leave:
                await service.router.hanging.wait()  # type: ignore[attr-defined]
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                return 0
            return (await asked).status_code

    return asyncio.run(call())


def lines_of(records: list[logging.LogRecord]) -> list[logging.LogRecord]:
    return [record for record in records if record.name.endswith(".logged")]


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_leaves_one_line_with_all_it_used(stream: bool, records: list[logging.LogRecord]) -> None:
    assert post(says(SAID, finish="length", cached=3), stream=stream) == 200
    [line] = lines_of(records)
    assert line.getMessage().startswith(f"completions ok: length, 5 tokens in (3 known), {TOKENS} out, first after 0.")
    said = vars(line)
    assert (said["request_id"], said["outcome"], said["error"], said["stream"]) == (ID, "ok", None, stream)
    assert said["endpoint"] == TEXT
    assert (said["prompt_tokens"], said["cached_tokens"], said["completion_tokens"]) == (5, 3, TOKENS)
    assert said["finish_reasons"] == ["length"]
    assert 0 < said["first_token_s"] <= said["seconds"] < 5
    assert said["completion_id"].startswith("cmpl-")
    assert said["completion_id"] in line.getMessage()


def test_several_prompts_are_one_request(records: list[logging.LogRecord]) -> None:
    assert post(says("hi", finish="length"), prompt=["a", "bc"], n=2) == 200
    [line] = lines_of(records)
    assert vars(line)["finish_reasons"] == ["length"] * 4
    assert (vars(line)["prompt_tokens"], vars(line)["completion_tokens"]) == (3, 8)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_request_says_with_what_and_how_far_it_came(stream: bool, records: list[logging.LogRecord]) -> None:
    def breaks(_: GenerationRequest) -> Iterator[TokenChunk | Exception]:
        yield TokenChunk(0, (5,))
        yield ExpertsUnavailableError("experts-0 is missing")

    assert post(breaks, stream=stream) == (200 if stream else 503)
    [line] = lines_of(records)
    assert line.getMessage().startswith("completions error: experts_unavailable, 5 tokens in (0 known), 1 out")
    assert (vars(line)["outcome"], vars(line)["error"]) == ("error", "experts_unavailable")
    assert all(vars(each)["request_id"] == ID for each in records)


@pytest.mark.parametrize(("stream", "part"), [(False, "complete"), (True, "opening"), (True, "chunks")])
def test_an_answer_that_could_not_be_made_is_an_error(
    stream: bool, part: str, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(TextAnswer, part, breaks)
    assert post(says(SAID), stream=stream) == (200 if stream else 500)
    [line] = lines_of(records)
    assert line.getMessage().startswith("completions error: unforeseen, 5 tokens in ")
    assert (vars(line)["outcome"], vars(line)["error"]) == ("error", "unforeseen")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_said_to_have_left(stream: bool, records: list[logging.LogRecord]) -> None:
    assert post(lambda _: [TokenChunk(0, (5,)), "hang"], leave=True, stream=stream) == 0
    [line] = lines_of(records)
    assert line.getMessage().startswith("completions client_gone: unfinished, 5 tokens in (0 known), ")
    assert vars(line)["outcome"] == "client_gone"


def test_a_refused_request_says_why_in_words_that_are_ours(records: list[logging.LogRecord]) -> None:
    assert post(says("x"), top_p="secret") == 400
    assert lines_of(records) == []
    [line] = records
    assert line.getMessage() == "answered with 400: RequestError, invalid_value"
    assert (vars(line)["request_id"], vars(line)["status"], vars(line)["code"]) == (ID, 400, "invalid_value")
    assert "secret" not in json.dumps(vars(line), default=repr)


def test_what_the_client_is_not_told_is_logged_under_its_id(records: list[logging.LogRecord]) -> None:
    assert post(lambda _: [EngineError("inner words")]) == 500
    assert {vars(record)["request_id"] for record in records} == {ID}
    assert "a request failed" in [record.getMessage() for record in records]


def test_lost_routers_are_logged_under_the_id(records: list[logging.LogRecord]) -> None:
    def script(request: GenerationRequest) -> Iterator[TokenChunk | Exception]:
        yield TokenChunk(0, (5,), None, "length" if "/" in request.request_id else None)
        yield RouterStoppingError("going")

    async def call() -> int:
        router = ResumingRouter(FakeRouter(script), clock=lambda: 0.0, pause_s=0.0)
        async with http(make_service(says("x"), router=router)) as client:
            body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8}
            return (await client.post(TEXT, json=body, headers={HEADER: ID})).status_code

    assert asyncio.run(call()) == 200
    [line] = [record for record in records if "goes on elsewhere" in record.getMessage()]
    assert vars(line)["request_id"] == ID

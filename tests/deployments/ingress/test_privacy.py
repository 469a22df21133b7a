"""What a client says, and the key it says it with, stay out of logs and of error texts (1 s)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from cluster.errors import EngineError, ExpertsUnavailableError, OverloadedError, RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.keys import KeyLimits, KeyRecord, digest_of
from tests.deployments.ingress.fakes import Script, http, make_service, says

PROMPT = "canary-7e41-prompt"
KEY = "xs-canary-93fd-key"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": PROMPT}


def raising(error: Exception, after: int = 0) -> Script:
    def script(request: GenerationRequest) -> Iterable[TokenChunk | Exception | str]:  # noqa: ARG001
        return [*[TokenChunk(0, (5,)) for _ in range(after)], error]

    return script


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [USER], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": PROMPT, **fields}


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat()),
    (CHAT, chat(stream=True)),
    (TEXT, text()),
    (TEXT, text(stream=True)),
    # the prompt where it does not belong, or in the wrong shape
    (CHAT, chat(messages=PROMPT)),
    (CHAT, chat(messages=[PROMPT])),
    (CHAT, chat(messages=[{"role": "user", "content": [PROMPT]}])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": [PROMPT]}]}])),
    (CHAT, chat(messages=[{"role": "user", "content": {"text": PROMPT}}])),
    (CHAT, chat(messages=[USER, {"role": "system", "content": PROMPT}, USER])),
    (CHAT, chat(messages=[USER | {"tool_calls": [PROMPT]}])),
    (CHAT, chat(messages=[{"role": "user", "content": f"{PROMPT} " * 300}])),
    (CHAT, chat(messages=[USER | {"name": [PROMPT]}])),
    (CHAT, chat(tools=[PROMPT], stop=PROMPT)),
    (CHAT, chat(stop=[PROMPT, 5])),
    (CHAT, chat(stop={"x": PROMPT})),
    (CHAT, chat(user=[PROMPT])),
    (CHAT, chat(user=PROMPT, temperature="hot")),
    (CHAT, chat(messages=[USER | {"content": PROMPT + "\ud800"}])),
    (TEXT, text(prompt=[PROMPT, 5])),
    (TEXT, text(prompt={"x": PROMPT})),
    (TEXT, text(suffix=PROMPT)),
    (TEXT, text(logit_bias={"5": PROMPT * 5})),
]
ROUTERS: list[Script] = [
    says("hello"),
    raising(EngineError("a step failed")),
    raising(EngineError("a step failed"), after=2),
    raising(OverloadedError("full")),
    raising(ExpertsUnavailableError("experts-0 is missing")),
    raising(RouterStoppingError("going")),
    # A library's own error, which quotes what it was given.
    raising(ValueError(f"cannot encode {PROMPT!r}")),
    raising(KeyError(PROMPT), after=2),
]


class Watch(logging.Handler):
    """Everything that is logged by anybody, as it would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # With everything a JSON log would show of it.
        self.lines.append(f"{self.format(record)} {vars(record)}")


@pytest.fixture
def logged() -> Iterable[Watch]:
    watch, root = Watch(), logging.getLogger()
    known = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    # Whoever has set up logging before, such as Ray, may have cut loggers off from the root.
    watched = [root, *(each for each in known if not each.propagate)]
    before = {each: (each.level, each.disabled) for each in [root, *known]}
    for each in watched:
        each.addHandler(watch)
        each.setLevel(logging.DEBUG)
    for each in known:
        each.disabled = False
    yield watch
    for each in watched:
        each.removeHandler(watch)
    for each, (level, disabled) in before.items():
        each.setLevel(level)
        each.disabled = disabled


def secretive(watch: Watch, responses: Iterable[httpx.Response]) -> None:
    assert watch.lines  # at least the client's own line: the watch works
    for line in watch.lines:
        assert PROMPT not in line
        assert KEY not in line
    for response in responses:
        assert KEY not in response.text
        assert KEY not in str(response.headers)
        if response.status_code >= 400 or '"error"' in response.text:
            assert PROMPT not in response.text


@pytest.mark.parametrize("script", ROUTERS, ids=range(len(ROUTERS)))
def test_no_request_leaves_its_prompt_or_key_behind(script: Script, logged: Watch) -> None:
    async def story() -> list[httpx.Response]:
        keys = Keys((KeyRecord("canary", digest_of(KEY)),))
        async with http(make_service(script, auth=Authenticator(keys))) as client:
            client.headers["authorization"] = f"Bearer {KEY}"
            return [await client.post(path, content=json.dumps(body)) for path, body in BODIES]

    secretive(logged, asyncio.run(story()))


@pytest.mark.parametrize("limits", [KeyLimits(requests_per_min=1), KeyLimits(tokens_per_min=1), KeyLimits(streams=1)])
def test_a_key_is_not_shown_where_it_is_refused(limits: KeyLimits, logged: Watch) -> None:
    async def story() -> list[httpx.Response]:
        known = Keys((KeyRecord("canary", digest_of(KEY), limits),))
        responses = []
        for auth in (Authenticator(known), Authenticator(Keys(())), Authenticator(known, Keys(()))):
            async with http(make_service(says("x"), auth=auth)) as client:
                for value in (f"Bearer {KEY}", f"Basic {KEY}", KEY, f"Bearer  {KEY} {KEY}"):
                    client.headers["authorization"] = value
                    responses += [await client.post(CHAT, json=chat()) for _ in range(2)]
                    responses.append(await client.get("/v1/cluster"))
        return responses

    responses = asyncio.run(story())
    assert {response.status_code for response in responses} >= {401}
    secretive(logged, responses)


def test_an_error_nobody_foresaw_is_logged_with_its_place_but_not_its_words(logged: Watch) -> None:
    async def story() -> httpx.Response:
        async with http(make_service(raising(ValueError(PROMPT)))) as client:
            return await client.post(CHAT, json=chat())

    assert asyncio.run(story()).status_code == 500
    [line] = {line for line in logged.lines if "a request failed" in line}
    assert "ValueError" in line
    assert "fakes.py" in line
    assert PROMPT not in line

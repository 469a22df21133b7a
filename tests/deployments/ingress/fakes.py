"""A router and a cluster that do what a test says, and an application over them; no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import httpx

from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.api import create_app
from deployments.ingress.auth import Authenticator
from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.clients import Health
from deployments.ingress.service import ServedModel, Service
from tests.tokenizers import byte_level

EOS = 1
MODEL = ServedModel(name="demo", max_context=256, vocab_size=400, created=1_700_000_000, fingerprint="fp_test")
TOKENIZER = ChatTokenizer(byte_level())

# A script answers a request; an exception in it is raised at that point, "hang" waits for ever.
Script = Callable[[GenerationRequest], Iterable[TokenChunk | Exception | str]]


class FakeRouter:
    """Records requests, sessions and which requests were closed before their script ended."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.requests: list[GenerationRequest] = []
        self.sessions: list[str | None] = []
        self.cancelled: list[str] = []
        self.hanging = asyncio.Event()

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        self.sessions.append(session_id)
        finished = False
        try:
            for item in self._script(request):
                if isinstance(item, Exception):
                    finished = True
                    raise item
                if isinstance(item, str):
                    self.hanging.set()
                    await asyncio.Event().wait()
                else:
                    yield item
                    await asyncio.sleep(0)
            finished = True
        finally:
            if not finished:
                self.cancelled.append(request.request_id)


class FakeCluster:
    """Reports what it was given."""

    def __init__(self, health: Health | Exception = Health()) -> None:  # noqa: B008 - frozen
        self._health = health

    async def health(self) -> Health:
        if isinstance(self._health, Exception):
            raise self._health
        return self._health

    async def snapshot(self) -> dict[str, Any]:
        return {"model": "demo", "epoch": ["a", 3], "groups": []}

    async def loads(self) -> dict[str, Any]:
        return {"layers": [1, 2], "domains": {"recorded": [[5, 0, 3], [0, 0, 8]]}}


def says(text: str, finish: str = "stop", cached: int = 0) -> Script:
    """Every choice says `text`, a token a chunk, and ends."""

    def script(request: GenerationRequest) -> Iterable[TokenChunk]:
        choices = range(request.choice, request.choice + request.sampling.n)
        tokens = TOKENIZER.text_tokens(text)
        for i, token in enumerate(tokens):
            for choice in choices:
                last = finish == "length" and i == len(tokens) - 1
                yield TokenChunk(choice, (token,), None, "length" if last else None, cached if i == 0 else 0)
        if finish == "stop":
            for choice in choices:
                yield TokenChunk(choice, (EOS,), None, "stop")

    return script


def make_service(script: Script, **changes: Any) -> Service:
    """A service whose router follows `script`; `changes` are fields of Service."""
    parts: dict[str, Any] = {
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "router": FakeRouter(script),
        "cluster": FakeCluster(),
        "auth": Authenticator(),
    }
    return Service(**(parts | changes))


def http(service: Service) -> httpx.AsyncClient:
    """A client straight into the application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(service)), base_url="http://test")

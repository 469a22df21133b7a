"""Streamed completions as clients see them: their text, when each piece of it came, and how they ended."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.conftest import MODEL
from tests.e2e.load import PROMPTS

TOKENS = 220
ANSWER_S = 120.0


@dataclass(frozen=True)
class Asked:
    """One request. seed: None for greedy."""

    prompt: str
    seed: int | None
    max_tokens: int = TOKENS

    def body(self, *, stream: bool) -> dict[str, Any]:
        """As sent."""
        chosen: dict[str, Any] = {"temperature": 0} if self.seed is None else {"temperature": 0.8, "seed": self.seed}
        fixed = {"model": MODEL, "prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        return fixed | chosen | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


@dataclass
class Told:
    """What came back. times: of each piece of text, monotonic seconds. finish: of every choice that ended.

    done: the stream said so itself. status: of HTTP, 0 where there was none. retry_after: of a refusal.
    """

    text: str = ""
    times: list[float] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    tokens: int = 0
    done: bool = False
    status: int = 0
    error: str = ""
    retry_after: str | None = None

    @property
    def whole(self) -> bool:
        """Ended once, as a stream should."""
        return self.done and not self.error and self.finish == ["length"]

    def stall_s(self, since: float) -> float:
        """The longest wait between two pieces, of those that ended after `since`."""
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False) if after > since]
        return max(gaps, default=0.0)


def requests() -> list[Asked]:
    """16 of them, of two domains, half greedy and half seeded."""
    prompts = [*PROMPTS["python"][:4], *PROMPTS["chinese"][:4]]
    return [Asked(prompt, seed) for seed in (None, 7) for prompt in prompts]


def ask(
    port: int,
    asked: Asked,
    told: Told,
    *,
    host: str = "127.0.0.1",
    stop: threading.Event | None = None,
    request_id: str | None = None,
) -> Told:
    """Stream one completion into `told`; `stop` hangs up in the middle. Never raises: `told.error` says what broke.

    request_id: what Serve calls the request in its log; it thinks of a name itself where there is none.
    """
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        body = json.dumps(asked.body(stream=True))
        headers = {"Content-Type": "application/json"} | ({"X-Request-ID": request_id} if request_id else {})
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        told.status, told.retry_after = response.status, response.headers.get("Retry-After")
        if response.status != 200:
            told.error = response.read().decode(errors="replace")
            return told
        for line in response:
            if line.startswith(b"data: "):
                _take(line[6:].strip(), told)
            if stop is not None and stop.is_set():
                return told
    except (OSError, http.client.HTTPException, ValueError) as error:
        told.error = repr(error)
    finally:
        connection.close()
    return told


def _take(data: bytes, told: Told) -> None:
    if data == b"[DONE]":
        told.done = True
        return
    event = json.loads(data)
    if "error" in event:
        told.error = json.dumps(event["error"])
        return
    if usage := event.get("usage"):
        told.tokens = usage["completion_tokens"]
    for choice in event["choices"]:
        if choice["text"]:
            told.text += choice["text"]
            told.times.append(time.monotonic())
        if choice["finish_reason"]:
            told.finish.append(choice["finish_reason"])


class Streams:
    """Some requests streamed side by side. Use `running`."""

    def __init__(self, port: int, asked: Sequence[Asked]) -> None:
        self.asked = list(asked)
        self.told = [Told() for _ in asked]
        self._threads = [
            threading.Thread(target=ask, args=(port, each, told), daemon=True)
            for each, told in zip(self.asked, self.told, strict=True)
        ]

    @contextmanager
    def running(self, *, pieces: int = 3) -> Iterator[Streams]:
        """The block begins when every stream has shown so many pieces of text, and ends when all have ended."""
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + ANSWER_S
        while not all(len(told.times) >= pieces or told.done or told.error for told in self.told):
            assert time.monotonic() < deadline, "the streams do not begin"
            time.sleep(0.02)
        try:
            yield self
        finally:
            for thread in self._threads:
                thread.join(ANSWER_S)

    @property
    def alive(self) -> int:
        """Streams that have not ended."""
        return sum(thread.is_alive() for thread in self._threads)

    def stall_s(self, since: float) -> float:
        """The longest of any stream."""
        return max(told.stall_s(since) for told in self.told)

    def differences(self, wanted: Mapping[Asked, str]) -> list[str]:
        """One sentence for each stream that is not what it must be."""
        return [
            f"{asked.prompt[:20]!r} seed {asked.seed}: {told.error or told.finish} after {len(told.text)} characters, "
            f"{'the same' if wanted[asked].startswith(told.text) else 'OTHER'} text"
            for asked, told in zip(self.asked, self.told, strict=True)
            if not told.whole or told.text != wanted[asked]
        ]

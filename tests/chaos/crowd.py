"""Many independent clients that ask at a given rate whether or not the server keeps up, and what each was told.

Open loop: a client that is refused does not come back for it; one whose answer is not there yet when its next question
is due asks late. Greedy completions of a fixed length, not streamed: what is measured is the time to the whole answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

import httpx

from infra.bench.measure import percentile
from tests.e2e.conftest import MODEL

ANSWER_S = 60.0


@dataclass(frozen=True)
class Reply:
    """One answer. asked_at: monotonic seconds. retry_after: of a refusal, "" where there was none."""

    asked_at: float
    took_s: float
    status: int
    tokens: int = 0
    retry_after: str = ""
    text: str = ""

    @property
    def ended_at(self) -> float:
        """Monotonic seconds."""
        return self.asked_at + self.took_s


@dataclass(frozen=True)
class Replies:
    """Of one load, which began at `since` and let nobody ask after `until` (monotonic seconds)."""

    all: list[Reply]
    since: float
    until: float

    @property
    def served(self) -> list[Reply]:
        """Answered with tokens."""
        return [reply for reply in self.all if reply.status == 200]

    @property
    def refused(self) -> list[Reply]:
        """Answered 429."""
        return [reply for reply in self.all if reply.status == 429]

    @property
    def broken(self) -> list[Reply]:
        """Neither."""
        return [reply for reply in self.all if reply.status not in (200, 429)]

    def rate(self, after_s: float = 0.0) -> float:
        """Requests answered with tokens per second, from `after_s` after the beginning until the end of asking."""
        since = self.since + after_s
        return sum(since <= reply.ended_at < self.until for reply in self.served) / (self.until - since)

    def latency_s(self, share: float, after_s: float = 0.0) -> float:
        """That percentile (0 to 1) of the served that asked `after_s` after the beginning or later."""
        return percentile([r.took_s for r in self.served if r.asked_at >= self.since + after_s], share)


class Crowd:
    """Clients of the server on `port`. tokens: of every answer, ends of sequence ignored."""

    def __init__(self, port: int, prompts: tuple[str, ...], tokens: int) -> None:
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        self._prompts = prompts
        self._tokens = tokens

    def closed(self, clients: int, seconds: float, spread_s: float) -> Replies:
        """`clients` that ask again as soon as they are answered; they begin one after the other within `spread_s`, so
        that answers end evenly and can be counted."""
        starts = [spread_s * number / clients for number in range(clients)]
        return asyncio.run(self._run(starts, seconds, None))

    def at_rate(self, per_s: float, clients: int, seconds: float) -> Replies:
        """`per_s` questions a second in all, each client evenly and out of step with the others."""
        every_s, chance = clients / per_s, random.Random(clients)
        return asyncio.run(self._run([chance.random() * every_s for _ in range(clients)], seconds, every_s))

    async def _run(self, starts: list[float], seconds: float, every_s: float | None) -> Replies:
        limits = httpx.Limits(max_connections=len(starts), max_keepalive_connections=len(starts))
        async with httpx.AsyncClient(timeout=ANSWER_S, limits=limits) as http:
            since = time.monotonic()
            until = since + seconds
            told = await asyncio.gather(
                *(self._client(http, number, since + start, until, every_s) for number, start in enumerate(starts))
            )
        return Replies([reply for replies in told for reply in replies], since, until)

    async def _client(
        self, http: httpx.AsyncClient, number: int, start: float, until: float, every_s: float | None
    ) -> list[Reply]:
        replies: list[Reply] = []
        due = start
        while max(due, time.monotonic()) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            replies.append(await self.ask(http, self._prompts[(number + len(replies)) % len(self._prompts)]))
            due = due + every_s if every_s is not None else 0.0
        return replies

    async def ask(self, http: httpx.AsyncClient, prompt: str) -> Reply:
        """One question."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True}
        asked_at = time.monotonic()
        try:
            answer = await http.post(self._url, json=body)
        except httpx.HTTPError:
            return Reply(asked_at, time.monotonic() - asked_at, 0)
        took_s = time.monotonic() - asked_at
        if answer.status_code != 200:
            return Reply(asked_at, took_s, answer.status_code, retry_after=answer.headers.get("retry-after", ""))
        told = answer.json()
        tokens, text = told["usage"]["completion_tokens"], told["choices"][0]["text"]
        return Reply(asked_at, took_s, 200, tokens=tokens, text=text)

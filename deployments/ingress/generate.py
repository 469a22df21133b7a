"""One HTTP request while it runs: the router streams of its prompts, merged into deltas of its choices.

Owns the streams: whatever happens, `aclose` ends them, and with them the work on the routers. Knows no HTTP.

An answer has the tokens of one model, that of the first chunk, whatever is rolled out meanwhile. All prompts are asked
at once; one that another model begins to answer is asked again, before anything is shown of it. Where nobody has the
first model any more, an answer of which nothing has been given away begins anew with the other one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace

from cluster.errors import DeadlineError, EngineError, RouterStoppingError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.choices import Choice, Delta
from deployments.ingress.clients import RouterClient
from deployments.ingress.deadlines import Deadline
from deployments.ingress.errors import ClientGoneError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """Tokens of a whole request. A prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    """The choices of all prompts: prompt p's choice c of n has index p * n + c.

    heard: told of every choice that a chunk was added to; must be quick.
    digest: of the model that answers, in hex; "" while that is unknown.

    Use: `await next()` until None, then `usage()`; `aclose()` in any case, from any task, any number of times.
    """

    def __init__(
        self,
        router: RouterClient,
        requests: Sequence[GenerationRequest],
        *,
        session_id: str | None,
        tokenizer: ChatTokenizer,
        stops: Sequence[str],
        deadline: Deadline,
        heard: Callable[[Choice], None] = lambda _: None,
    ) -> None:
        self.digest = ""
        self._router = router
        self._session_id = session_id
        self._requests = list(requests)
        self._streams = [router.generate(request, session_id) for request in requests]
        self._asked_again: set[int] = set()
        self._other = ""  # the digest of another model that began a prompt
        self._anew = False
        self._n = requests[0].sampling.n
        self._tokenizer, self._stops = tokenizer, stops
        self.choices = self._make_choices()
        self._waits: dict[asyncio.Task[TokenChunk | None], int] = {}
        self._fresh = deque(range(len(self._streams)))  # streams to ask for their next chunk
        self._arrived: deque[tuple[int, asyncio.Task[TokenChunk | None]]] = deque()
        self._closing: asyncio.Task[None] | None = None
        self._deadline = deadline
        self._heard = heard

    async def collect(self) -> list[list[Delta]]:
        """All deltas of each choice, when every choice has finished. Raises as `next`."""
        while True:
            parts: list[list[Delta]] = [[] for _ in self.choices]
            try:
                while (delta := await self.next()) is not None:
                    parts[delta.choice].append(delta)
            except RouterStoppingError:
                if not self._other or self._anew:
                    raise
                await self._begin_anew(self._other)
            else:
                return parts

    async def next(self) -> Delta | None:
        """The next delta of any choice, or None when every choice has finished.

        Raises:
            ExpertScaleError: what the router raised; EngineError where a stream ends early; DeadlineError.
            RouterStoppingError: one prompt was begun by a model that no router has any more when another is asked.
            ClientGoneError: Serve cancelled the call to the router.
        """
        while True:
            self._ask()
            if not self._arrived:
                if not self._waits:
                    return None
                await self._wait()
            prompt, task = self._arrived.popleft()
            if task.cancelled():  # not by us: `aclose` ends the caller first. Serve does it when the client is gone.
                raise ClientGoneError
            try:
                chunk = task.result()
            except DeadlineError:
                raise self._deadline.error() from None  # the router knows only what was left of it
            if chunk is None:
                if not self._done(prompt):
                    raise EngineError("The router ended the stream before every choice was finished.")
                continue
            if chunk.digest and chunk.digest != self.digest and self.digest:
                self._other = chunk.digest
                await self._ask_again(prompt)
                continue
            self.digest = self.digest or chunk.digest
            choice = self.choices[prompt * self._n + chunk.choice]
            delta = choice.push(chunk)
            self._heard(choice)
            if any(choice.stopped_here for choice in self._of(prompt)) and self._done(prompt):
                await _close(self._streams[prompt])
            else:
                self._fresh.append(prompt)
            return delta if chunk.experts is None else replace(delta, experts=chunk.experts)

    def usage(self) -> Usage:
        """What was used so far."""
        cached = [
            min((choice.cached_tokens or 0 for choice in self._of(prompt)), default=0)
            for prompt in range(len(self._requests))
        ]
        return Usage(
            prompt_tokens=sum(request.prompt_tokens for request in self._requests),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            cached_tokens=sum(cached),
        )

    async def aclose(self) -> None:
        """End every stream. Goes on by itself when the caller is cancelled meanwhile."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close_all())
        await asyncio.shield(self._closing)

    def _of(self, prompt: int) -> list[Choice]:
        return self.choices[prompt * self._n : (prompt + 1) * self._n]

    def _done(self, prompt: int) -> bool:
        return all(choice.finish_reason is not None for choice in self._of(prompt))

    def _ask(self) -> None:
        while self._fresh:
            prompt = self._fresh.popleft()
            self._waits[asyncio.create_task(_pull(self._streams[prompt]))] = prompt

    async def _ask_again(self, prompt: int) -> None:
        """Instead of what another model began: all of the prompt, of the model that the others have."""
        await _close(self._streams[prompt])
        if prompt in self._asked_again:
            raise RouterStoppingError("The model was replaced while this request began; try again.")
        self._asked_again.add(prompt)
        request = self._requests[prompt]
        log.info("another model began to answer %s, it is asked again", request.request_id)
        self._streams[prompt] = self._router.generate(self._pinned(request, "again"), self._session_id)
        self._fresh.append(prompt)

    async def _begin_anew(self, digest: str) -> None:
        """All prompts once more, of the model that has replaced the first one."""
        log.info("the model that began %s has gone, the other one begins anew", self._requests[0].request_id)
        await self._close_all()
        self._anew, self.digest = True, digest
        self._asked_again.clear()
        self._waits.clear()
        self._arrived.clear()
        self._requests = [self._pinned(request, "anew") for request in self._requests]
        self._streams = [self._router.generate(request, self._session_id) for request in self._requests]
        self._fresh = deque(range(len(self._streams)))
        self.choices = self._make_choices()

    def _pinned(self, request: GenerationRequest, suffix: str) -> GenerationRequest:
        """`request` for the model of this answer and none else."""
        return replace(
            request,
            request_id=f"{request.request_id}/{suffix}",
            digest=self.digest,
            timeout_s=None if request.timeout_s is None else self._deadline.left_s(),
            accepted=True,
        )

    def _make_choices(self) -> list[Choice]:
        return [Choice(i, self._tokenizer, self._stops) for i in range(len(self._requests) * self._n)]

    async def _wait(self) -> None:
        patience_s = max(0.0, self._deadline.gone_s - asyncio.get_running_loop().time())
        done, _ = await asyncio.wait(self._waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise self._deadline.error()
        for task in sorted(done, key=self._waits.__getitem__):
            self._arrived.append((self._waits.pop(task), task))

    async def _close_all(self) -> None:
        for task in self._waits:
            task.cancel()
        await asyncio.gather(*self._waits, *(task for _, task in self._arrived), return_exceptions=True)
        await asyncio.gather(*(_close(stream) for stream in self._streams))


async def _pull(stream: AsyncGenerator[TokenChunk, None]) -> TokenChunk | None:
    return await anext(stream, None)


async def _close(stream: AsyncGenerator[TokenChunk, None]) -> None:
    try:
        await stream.aclose()
    except Exception:
        log.warning("a router stream did not close cleanly", exc_info=True)

"""What an engine says, down to the last bit: every token with its log-probability and those of twenty others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from cluster.blueprint import Blueprint
from cluster.config import AppConfig
from cluster.membership import View
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from deployments.router.runtime import RouterRuntime
from tests.expert_pool import KEY, NODE

END_S = 60.0
TOP = 20

Said = tuple[int, float, tuple[tuple[int, float], ...]]
"""A token, its log-probability, and the most probable ones with theirs. Floats are compared as they are."""


def request_of(number: int, prompt: Sequence[int], tokens: int) -> GenerationRequest:
    """Sampled at temperature 1 with a seed of its own; no end of sequence."""
    sampling = SamplingParams(max_tokens=tokens, seed=100 + number, logprobs=TOP, ignore_eos=True)
    return GenerationRequest(f"request-{number}", tuple(prompt), sampling, prompt_tokens=len(prompt))


def resumed(request: GenerationRequest, said: Sequence[Said], after: int) -> GenerationRequest:
    """The request as another router would get it, `after` tokens having been delivered."""
    delivered = tuple(token for token, _, _ in said[:after])
    return replace(request, request_id=f"{request.request_id}/{after}", tokens=request.tokens + delivered)


@dataclass
class _Listener:
    """Takes what a request emits."""

    said: list[Said] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __call__(self, item: TokenChunk | Exception) -> None:
        if isinstance(item, Exception):
            self.error = item
        else:
            assert item.logprobs is not None
            self.said += [(each.token, each.logprob, each.top) for each in item.logprobs]
        self.begun.set()
        if isinstance(item, Exception) or item.finish_reason is not None:
            self.ended.set()


class Talk:
    """Running routers over one view."""

    def __init__(self, routers: Sequence[RouterRuntime]) -> None:
        self._routers = routers

    @property
    def preemptions(self) -> int:
        """Of all routers so far."""
        return sum(router.engine.stats().preemptions for router in self._routers)

    def alone(self, requests: Sequence[GenerationRequest]) -> list[list[Said]]:
        """Each once the one before it has ended, on the first router."""
        return [self._end(self._begin(0, request)) for request in requests]

    def together(
        self,
        requests: Sequence[GenerationRequest],
        *,
        one_by_one: bool = False,
        midway: Callable[[], None] = lambda: None,
    ) -> list[list[Said]]:
        """All in one batch, spread over the routers. one_by_one: each joins when the one before it has begun.

        midway: called when half of them have joined.
        """
        listeners = []
        for number, request in enumerate(requests):
            listeners.append(self._begin(number, request))
            if one_by_one:
                assert listeners[-1].begun.wait(END_S)
            if number == len(requests) // 2:
                midway()
        return [self._end(listener) for listener in listeners]

    def _begin(self, number: int, request: GenerationRequest) -> _Listener:
        listener = _Listener()
        self._routers[number % len(self._routers)].engine.submit(request, listener)
        return listener

    def _end(self, listener: _Listener) -> list[Said]:
        assert listener.ended.wait(END_S)
        assert listener.error is None, listener.error
        return listener.said


@contextmanager
def talking(args: AppConfig, blueprint: Blueprint, view: View | None, routers: int = 1) -> Iterator[Talk]:
    """Routers at work. view: of the expert replicas; None where the routers hold the experts themselves."""
    with ExitStack() as stack:
        running = []
        for _ in range(routers):
            router = RouterRuntime(blueprint, args.experts, args.router, key=KEY, node=NODE)
            stack.callback(partial(router.stop))
            if view is not None:
                router.dispatcher.update(view)
            router.start()
            running.append(router)
        yield Talk(running)

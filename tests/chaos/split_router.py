"""A router in this process over any replicas, whose every token is compared with the whole model's, and its stalls.

Without Ray. Knows nothing of where the replicas are and what is wrong with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import AppConfig, parse_args
from cluster.fabric.dispatch import DispatchStats
from cluster.membership import Epoch, Replica, View
from deployments.generation import TokenChunk
from deployments.router.runtime import RouterRuntime
from tests.expert_pool import KEY, NODE
from tests.models import save
from tests.parity.split_model import TOKENS, greedy, near_ties, prompts
from tests.reference import Continuation, continuations

GROUPS = 2
TIMEOUT_S = 1.0
HEDGED_S = 0.4
"""A stall that hedging bounds, on a busy machine: far below any timeout."""
DETECTED_S = 20.0


@dataclass(frozen=True)
class Model:
    """A checkpoint and what the whole model makes of the prompts."""

    folder: Path
    blueprint: Blueprint
    reference: list[Continuation]

    def config(self, *, timeout_s: float = TIMEOUT_S, wait_s: float = 20.0) -> AppConfig:
        """What the blueprint was made for, but for the times."""
        experts = {"groups": GROUPS, "wait_s": wait_s, "timeout_s": timeout_s, "hedge_after": 3}
        router = {"max_batch_tokens": 24, "max_sequences": 8, "kv_tokens": 1024}
        return parse_args(
            {"model": {"path": str(self.folder), "dtype": "float32"}, "experts": experts, "router": router}
        )


def small_model(folder: Path) -> Model:
    """Two MoE layers in two groups."""
    save("mixtral", folder, torch.float32)
    unbound = Model(folder, None, [])  # type: ignore[arg-type]
    return Model(folder, make_blueprint(unbound.config()), continuations(folder, torch.float32, prompts(), TOKENS))


@dataclass
class Router:
    """A running router and what it has been through.

    waits_s: of a stream for its first piece. gaps_s: between two pieces of a stream, about one for every step after
    that. lost: the replicas it reported.
    """

    runtime: RouterRuntime
    model: Model
    lost: list[str]
    waits_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    ties: int = 0
    _failures: list[Exception] = field(default_factory=list)

    @property
    def longest_s(self) -> float:
        return max(self.waits_s + self.gaps_s)

    def forget(self) -> None:
        self.waits_s.clear()
        self.gaps_s.clear()

    @property
    def stats(self) -> DispatchStats:
        return self.runtime.dispatcher.stats()

    def answer(self, midway: Callable[[], None] = lambda: None) -> None:
        """All prompts at once; every token must be the whole model's. midway: when all streams have begun."""
        outputs: list[list[int]] = [[] for _ in prompts()]
        begun = [threading.Event() for _ in outputs]
        ended = [threading.Event() for _ in outputs]

        def submit(number: int, prompt: Sequence[int]) -> None:
            last_s = time.monotonic()

            def emit(item: TokenChunk | Exception) -> None:
                nonlocal last_s
                now = time.monotonic()
                (self.gaps_s if begun[number].is_set() else self.waits_s).append(now - last_s)
                last_s = now
                if isinstance(item, Exception):
                    self._failures.append(item)
                else:
                    outputs[number].extend(item.tokens)
                begun[number].set()
                if isinstance(item, Exception) or item.finish_reason is not None:
                    ended[number].set()

            self.runtime.engine.submit(greedy(number, prompt), emit)

        for number, prompt in enumerate(prompts()):
            submit(number, prompt)
        assert all(event.wait(60.0) for event in begun)
        midway()
        assert all(event.wait(60.0) for event in ended)
        assert not self._failures, self._failures
        self.ties += near_ties(self.model.reference, outputs)

    def until(self, condition: Callable[[], bool]) -> None:
        """Answer all prompts again and again until it is true."""
        give_up_s = time.monotonic() + DETECTED_S
        while not condition():
            assert time.monotonic() < give_up_s, self.stats
            self.answer()


@contextmanager
def routing(model: Model, replicas: Sequence[Replica], **times: float) -> Iterator[Router]:
    """A router that knows these replicas."""
    config, lost = model.config(**times), list[str]()
    runtime = RouterRuntime(model.blueprint, config.experts, config.router, key=KEY, node=NODE, on_lost=lost.append)
    router = Router(runtime, model, lost)
    try:
        runtime.dispatcher.update(View(Epoch("test", 1), tuple(replicas)))
        runtime.start()
        yield router
    finally:
        runtime.stop()

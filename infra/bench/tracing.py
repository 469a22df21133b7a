"""What traces cost a decode: at the default sampling, and with every request traced, against no endpoint at all.

Engine and experts alone (`split_model`), and a receiver in a process of its own that takes the spans and does nothing
with them; it shares the machine. The ingress, which draws the requests, is not here: at the default each hundredth
request is traced. A run is two hundred of them, so that every run at the default has its two. Answers are short: the
first steps of a sequence are the traced ones, so this costs more than answers of the usual length. Every run pays for
sending its spans, all processes once; a run takes two seconds, and by default they send every five.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from infra.bench import models
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate
from infra.bench.processes import Remote
from infra.bench.span_receiver import SpanReceiver
from infra.bench.split_model import SplitModel

SIDE = "tracing"
CLIENTS, BATCHES = 50, 4
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 24, 32, 4
EVERY = {"off": None, "default": 100, "all": 1}
"""Side -> each how many-th request is traced."""
TARGET = 1.02
"""Of the time per token at the default sampling."""


def run(context: Context) -> Iterator[Figure]:
    """About 40 s; in a smoke run 2 clients and 8 tokens."""
    context.progress("tracing: demo")
    clients, new_tokens = (2, 8) if context.smoke else (CLIENTS, NEW_TOKENS)
    cpu_ms: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        receiver = stack.enter_context(_receiving())
        args, environment = models.demo().args, {"OTEL_EXPORTER_OTLP_ENDPOINT": _ask(receiver, "endpoint")}
        plain = stack.enter_context(SplitModel(args, forked=True))
        traced = stack.enter_context(SplitModel(args, forked=True, environment=environment))

        def decode(name: str) -> float:
            """Milliseconds per token."""
            model, started_s, tokens, cpu_s = plain if name == "off" else traced, time.monotonic(), 0, 0.0
            for _ in range(BATCHES):
                done = model.decode(clients, PROMPT_TOKENS, new_tokens, trace_every=EVERY[name])
                tokens += done.tokens
                cpu_s += done.cpu_s
            cpu_s += model.flush()
            cpu_ms[name].append(1e3 * cpu_s / tokens)
            return 1e3 * (time.monotonic() - started_s) / tokens

        taken = alternate({name: partial(decode, name) for name in EVERY}, rounds=context.rounds(ROUNDS))
        spans: dict[str, int] = _ask(receiver, "spans")
    case = f"demo, {clients} clients"
    yield from _figures(context, case, taken, {name: Samples(tuple(each[1:])) for name, each in cpu_ms.items()})
    yield Figure(SIDE, case, "spans of FFNs received, all runs", spans.get("ffn", 0), "")


def _figures(context: Context, case: str, wall_ms: dict[str, Samples], cpu_ms: dict[str, Samples]) -> Iterator[Figure]:
    for name, about, target in (
        ("default", f"each {EVERY['default']}th request traced", TARGET),
        ("all", "every request traced", None),
    ):
        for what, taken, judged in (("time", wall_ms, target), ("CPU", cpu_ms, None)):
            overhead = taken[name].median / taken["off"].median - 1
            context.progress(f"tracing: {about}: {what} per token {overhead:+.1%}")
            against = "no endpoint", taken["off"]
            yield compared(SIDE, case, f"{what} per token, {about}", taken[name], *against, unit="ms", target=judged)


@contextmanager
def _receiving() -> Iterator[Remote]:
    receiver = Remote(SpanReceiver)
    try:
        receiver.answer()
        yield receiver
    finally:
        receiver.hang_up()
        receiver.join()


def _ask(remote: Remote, method: str) -> Any:
    remote.ask(method)
    return remote.answer()

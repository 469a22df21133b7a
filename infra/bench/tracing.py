"""What traces cost a decode: at the default sampling, and with every request traced, against no endpoint at all.

Engine and experts alone (`split_model`), and a receiver in a process of its own that takes the spans and does nothing
with them; it shares the machine. The ingress, which draws the requests, is not here: at the default each hundredth
request is traced. All of a run are submitted at once, so their sampled steps are the same ones; where requests come at
any time more steps are traced, each for fewer sequences. Spans are sent every fifth of a second, not every five seconds
as by default, so that a run pays for its own; what is left is sent before the next run.
"""

from __future__ import annotations

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
from infra.bench.split_model import Decoded, SplitModel

SIDE = "tracing"
CLIENTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 24, 64, 8
EVERY = {"off": None, "default": 100, "all": 1}
"""Side -> each how many-th request is traced."""
TARGET = 1.02
"""Of the time per token at the default sampling."""


def run(context: Context) -> Iterator[Figure]:
    """Three quarters of a minute; in a smoke run 2 clients and 8 tokens."""
    context.progress("tracing: demo")
    clients, new_tokens = (2, 8) if context.smoke else (CLIENTS, NEW_TOKENS)
    args = models.demo().args
    kept: dict[str, list[Decoded]] = {name: [] for name in EVERY}
    with ExitStack() as stack:
        receiver = stack.enter_context(_receiving())
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": _ask(receiver, "endpoint"), "OTEL_BSP_SCHEDULE_DELAY": "200"}
        plain = stack.enter_context(SplitModel(args, forked=True))
        traced = stack.enter_context(SplitModel(args, forked=True, environment=environment))

        def decode(name: str) -> float:
            model = plain if name == "off" else traced
            kept[name].append(model.decode(clients, PROMPT_TOKENS, new_tokens, trace_every=EVERY[name]))
            model.flush()
            return kept[name][-1].wall_s

        alternate({name: partial(decode, name) for name in EVERY}, rounds=context.rounds(ROUNDS))
        spans: dict[str, int] = _ask(receiver, "spans")
    yield from _figures(context, f"demo, {clients} clients", {name: done[1:] for name, done in kept.items()})
    yield Figure(SIDE, f"demo, {clients} clients", "FFN spans received", spans.get("ffn", 0), "")


def _figures(context: Context, case: str, done: dict[str, list[Decoded]]) -> Iterator[Figure]:
    def wall_ms(name: str) -> Samples:
        return Samples(tuple(1e3 * each.wall_s / each.tokens for each in done[name]))

    def cpu_ms(name: str) -> Samples:
        return Samples(tuple(1e3 * each.cpu_s / each.tokens for each in done[name]))

    off = wall_ms("off")
    for name, about, target in (
        ("default", f"each {EVERY['default']}th request traced", TARGET),
        ("all", "every request traced", None),
    ):
        taken = wall_ms(name)
        context.progress(f"tracing: {about}: {100 * (taken.median / off.median - 1):+.1f} % time per token")
        yield compared(SIDE, case, f"time per token, {about}", taken, "no endpoint", off, unit="ms", target=target)
        yield compared(SIDE, case, f"CPU per token, {about}", cpu_ms(name), "no endpoint", cpu_ms("off"), unit="ms")


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

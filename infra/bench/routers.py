"""Two routers that share the experts, against one with the same clients: rows per expert batch, and tokens per second.

An expert replica computes whatever rows wait for a layer as one batch, from whichever router. Two routers step
independently, so their rows meet only where one's wait while the other's are computed: the share that does is the
question here, no target. Engines and experts alone, without HTTP and Ray (`split_model`); the same expert processes
throughout, and the second router idles while the first has all clients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from infra.bench import models
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate
from infra.bench.split_model import Decoded, SplitModel

CLIENTS_OF_ROUTER = 16
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 24, 128, 4


def run(context: Context) -> list[Figure]:
    """About half a minute; in a smoke run 2 + 2 clients and 8 tokens."""
    clients, new_tokens = (2, 8) if context.smoke else (CLIENTS_OF_ROUTER, NEW_TOKENS)
    # Side -> (routers, clients): both, one with the clients of both, one with its own.
    sides = {"both": (2, 2 * clients), "one": (1, 2 * clients), "half": (1, clients)}
    kept: dict[str, list[Decoded]] = {name: [] for name in sides}
    with SplitModel(models.demo().args, routers=2, forked=True) as model:

        def decode(name: str) -> float:
            routers, total = sides[name]
            kept[name].append(model.decode(total, PROMPT_TOKENS, new_tokens, routers=routers))
            return kept[name][-1].tokens_per_s

        alternate({name: partial(decode, name) for name in sides}, rounds=context.rounds(ROUNDS))
    return _figures(clients, {name: done[1:] for name, done in kept.items()})


def _figures(clients: int, done: dict[str, list[Decoded]]) -> list[Figure]:
    case = f"demo, {clients} + {clients} clients"
    one, half = f"one router, {2 * clients} clients", f"one router, {clients} clients"

    def of(name: str, value: Callable[[Decoded], float]) -> Samples:
        return Samples(tuple(value(each) for each in done[name]))

    def figure(what: str, value: Callable[[Decoded], float], against: str, reference: str, unit: str) -> Figure:
        return compared("routers", case, what, of("both", value), against, of(reference, value), unit=unit)

    return [
        figure("decode, two routers", lambda each: each.tokens_per_s, one, "one", "tokens/s"),
        figure("CPU, two routers", lambda each: 1e3 * each.cpu_s / each.tokens, one, "one", "ms/token"),
        figure("rows of an expert batch", lambda each: each.rows_per_batch, one, "one", "rows"),
        figure("rows of an expert batch", lambda each: each.rows_per_batch, half, "half", "rows"),
    ]

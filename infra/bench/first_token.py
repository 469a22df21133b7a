"""Time to the first token of CLIENTS clients that come at once, against the whole model's prefill of the same tokens.

The reference of a client is the time the whole model needs for the prompts queued up to and including its own: it
prefills them one after the other, or a few at a time, with one thread or two, whichever gives the lower median in a
trial. Clients all start at the same moment, so their times in order of arrival are compared with the reference's times
in order: the median with the median, the 95th percentile with the 95th. Every round has new prompts; the same prompts
again (`repeated`) find all their pages but the last in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.http_load import Endpoint
from infra.bench.measure import Samples, percentile
from infra.bench.models import BenchModel
from infra.bench.reference import THREADS, WholeModel, random_prompts

SIDE = "serving"
CLIENTS, PROMPT_TOKENS = 16, 512
BATCHES, TRIED = (1, 4), 8
SHARES = (0.5, 0.95)
MEDIAN_TARGET, REPEATED_TARGET = 1.5, 3.0

_seeds = itertools.count(2000)


def first_token(context: Context, model: BenchModel, whole: WholeModel, server: Endpoint) -> Iterable[Figure]:
    """Figures of the first token, cold and repeated."""
    context.progress(f"{model.name}: first token, {CLIENTS} clients of {PROMPT_TOKENS} tokens")
    prompts = _prompts(model)
    server.complete(prompts, 1)
    ways = [*itertools.product(BATCHES, THREADS)] * 2
    trials = [(percentile(whole.prefill_s(prompts[:TRIED], *way), 0.5), way) for way in ways]
    batch, threads = min(trials)[1]
    reference: list[list[float]] = []
    cold: list[list[float]] = []
    repeated: list[list[float]] = []
    for _ in range(context.rounds(3)):
        prompts = _prompts(model)
        reference.append(whole.prefill_s(prompts, batch, threads))
        cold.append([stream.first_s for stream in server.complete(prompts, 1).streams])
        repeated.append([stream.first_s for stream in server.complete(prompts, 1).streams])
    case = f"{model.name}, {CLIENTS} x {PROMPT_TOKENS} tokens"
    against = f"prefill of the queue, batch {batch}, {threads} threads"
    for share in SHARES:
        target = MEDIAN_TARGET if share == 0.5 else None
        what = f"time to first token, p{100 * share:.0f}"
        yield compared(SIDE, case, what, _ms(cold, share), against, _ms(reference, share), unit="ms", target=target)
    for share in SHARES:
        # Both orders say the same; this one reads as "so many times faster".
        target = REPEATED_TARGET if share == 0.5 else None
        what, again = f"time to first token, p{100 * share:.0f}, cold", "the same prompts repeated"
        yield compared(
            SIDE, case, what, _ms(cold, share), again, _ms(repeated, share), unit="ms", target=target, at_most=False
        )


def _prompts(model: BenchModel) -> list[list[int]]:
    return random_prompts(CLIENTS, PROMPT_TOKENS, model.vocab_size, next(_seeds))


def _ms(rounds: Sequence[Sequence[float]], share: float) -> Samples:
    """The percentile of every round, in milliseconds."""
    return Samples(tuple(1e3 * percentile(times, share) for times in rounds))

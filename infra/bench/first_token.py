"""Time to the first token of CLIENTS clients that come at once, against the whole model's prefill of the same tokens.

The reference of a client is the time the whole model needs for the prompts queued up to and including its own: it
prefills them one after the other, or a few at a time, with one thread or two, whichever gives the lower median in a
trial. Clients all start at the same moment, so their times in order of arrival are compared with the reference's times
in order: the median with the median, the 95th percentile with the 95th. Every round has new prompts.

What the prefix cache saves is shown twice. The same prompts again (`repeated`) find all their pages but the last. And
prompts that share SHARED_TOKENS and end each in its own way: their prefix has not been seen before (cold), or all
clients come a second time with other endings (warm). Cold ones come at once too and may profit from each other.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.http_load import Endpoint
from infra.bench.measure import Samples, percentile
from infra.bench.models import BenchModel
from infra.bench.reference import THREADS, WholeModel, random_prompts

SIDE = "serving"
CLIENTS, PROMPT_TOKENS, SHARED_TOKENS = 16, 512, 448
BATCHES, TRIED = (1, 4), 4
SHARES = (0.5, 0.95)
MEDIAN_TARGET, CACHED_TARGET = 1.5, 3.0

_seeds = itertools.count(2000)


def first_token(context: Context, model: BenchModel, whole: WholeModel, server: Endpoint) -> Iterable[Figure]:
    """Figures of the first token: of prompts with nothing in common, repeated, and with a shared prefix."""
    context.progress(f"{model.name}: first token, {CLIENTS} clients of {PROMPT_TOKENS} tokens")
    prompts = _prompts(model)
    _first_s(server, prompts)
    ways = [*itertools.product(BATCHES, THREADS)] * 2
    trials = [(percentile(whole.prefill_s(prompts[:TRIED], *way), 0.5), way) for way in ways]
    batch, threads = min(trials)[1]
    taken: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(context.rounds(3)):
        prompts = _prompts(model)
        taken["reference"].append(whole.prefill_s(prompts, batch, threads))
        taken["cold"].append(_first_s(server, prompts))
        taken["repeated"].append(_first_s(server, prompts))
        (prefix,) = _prompts(model, 1, SHARED_TOKENS)
        taken["shared, cold"].append(_first_s(server, _continued(model, prefix)))
        taken["shared, warm"].append(_first_s(server, _continued(model, prefix)))
    yield from _figures(model, taken, f"prefill of the queue, batch {batch}, {threads} threads")


def _figures(model: BenchModel, taken: Mapping[str, list[list[float]]], prefill: str) -> Iterator[Figure]:
    case = f"{model.name}, {CLIENTS} x {PROMPT_TOKENS} tokens"
    for share in SHARES:
        target = MEDIAN_TARGET if share == 0.5 else None
        what, cold, reference = _what(share), _ms(taken["cold"], share), _ms(taken["reference"], share)
        yield compared(SIDE, case, what, cold, prefill, reference, unit="ms", target=target)
    # Slow against fast, to be read as "so many times faster".
    shared = f"{case}, {SHARED_TOKENS} shared"
    for of, slow, fast, against in (
        (case, "cold", "repeated", "the same prompts repeated"),
        (shared, "shared, cold", "shared, warm", "the prefix known, new endings"),
    ):
        for share in SHARES:
            samples = _ms(taken[slow], share), _ms(taken[fast], share)
            target = CACHED_TARGET if (share, of) == (0.5, case) else None
            what = f"{_what(share)}, cold"
            yield compared(SIDE, of, what, samples[0], against, samples[1], unit="ms", target=target, at_most=False)
    what, against = f"{_what(0.5)}, nothing shared", "the prefix known, new endings"
    unshared, warm = _ms(taken["cold"], 0.5), _ms(taken["shared, warm"], 0.5)
    # The cold prompts of a shared prefix share it among themselves: without a prefix is these.
    yield compared(SIDE, shared, what, unshared, against, warm, unit="ms", target=CACHED_TARGET, at_most=False)


def _what(share: float) -> str:
    return f"time to first token, p{100 * share:.0f}"


def _first_s(server: Endpoint, prompts: list[list[int]]) -> list[float]:
    """Each client's time to its first token."""
    return [stream.first_s for stream in server.complete(prompts, 1).streams]


def _continued(model: BenchModel, prefix: list[int]) -> list[list[int]]:
    """Prompts of full length that begin with `prefix` and go on in new ways."""
    return [prefix + ending for ending in _prompts(model, CLIENTS, PROMPT_TOKENS - len(prefix))]


def _prompts(model: BenchModel, count: int = CLIENTS, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Prompts that no earlier call has given."""
    return random_prompts(count, tokens, model.vocab_size, next(_seeds))


def _ms(rounds: Sequence[Sequence[float]], share: float) -> Samples:
    """The percentile of every round, in milliseconds."""
    return Samples(tuple(1e3 * percentile(times, share) for times in rounds))

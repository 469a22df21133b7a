"""How a decode step grows: with the groups its experts are cut into, with its sequences, and with their context.

Each axis has one model and one thing that is doubled; "no worse than linear" says that what is doubled takes at most
twice the time. Engine and experts alone, without HTTP and Ray (`split_model`). All sizes of an axis take turns. The
sizes of the groups axis are split models of their own, which all stay up and idle while another one is measured.
Contexts are built by prefill in the warm-up round and kept by the router, so that later rounds only decode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from cluster.config import AppConfig, parse_args
from infra.bench import models
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import Samples, alternate
from infra.bench.split_model import Prompt, SplitModel

GROUPS = (1, 2, 4, 8)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_TOKENS = (128, 512, 1024, 2048, 4096)
SEQUENCES_OF_GROUPS, SEQUENCES_OF_CONTEXT = 8, 4
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 16, 48, 4
KV_TOKENS = 40960
"""Enough to keep every prompt of the context axis from round to round."""


def run(context: Context) -> list[Figure]:
    """About a minute; in a smoke run two sizes of one axis."""
    if context.smoke:
        return [*_by_sequences(context, (1, 8))]
    return [*_by_groups(context), *_by_sequences(context, SEQUENCES), *_by_context(context)]


def _by_groups(context: Context) -> Iterator[Figure]:
    context.progress(f"growth: {GROUPS} groups")
    with ExitStack() as stack:
        split = {
            groups: stack.enter_context(
                SplitModel(_changed(models.demo().args, "experts", groups=groups, placement="contiguous"), forked=True)
            )
            for groups in GROUPS
        }
        sides = {
            str(groups): partial(_step_ms, model, SEQUENCES_OF_GROUPS, PROMPT_TOKENS) for groups, model in split.items()
        }
        taken = alternate(sides, rounds=context.rounds(ROUNDS))
    yield from _figures(f"demo, {SEQUENCES_OF_GROUPS} sequences", "groups", taken)


def _by_sequences(context: Context, sizes: tuple[int, ...]) -> Iterator[Figure]:
    context.progress(f"growth: {sizes} sequences")
    with SplitModel(models.demo().args, forked=True) as model:
        sides = {str(sequences): partial(_step_ms, model, sequences, PROMPT_TOKENS) for sequences in sizes}
        taken = alternate(sides, rounds=context.rounds(ROUNDS))
    yield from _figures("demo, 4 groups", "sequences", taken)


def _by_context(context: Context) -> Iterator[Figure]:
    context.progress(f"growth: contexts of {CONTEXT_TOKENS} tokens")
    args = _changed(models.deepseek6(context).args, "router", kv_tokens=KV_TOKENS)
    with SplitModel(args, forked=True) as model:
        prompts = {tokens: model.prompts(SEQUENCES_OF_CONTEXT, tokens) for tokens in CONTEXT_TOKENS}
        sides = {str(tokens): partial(_continued_ms, model, prompts[tokens]) for tokens in CONTEXT_TOKENS}
        taken = alternate(sides, rounds=context.rounds(ROUNDS))
    yield from _figures(f"deepseek6, {SEQUENCES_OF_CONTEXT} sequences", "context tokens", taken)


def _step_ms(model: SplitModel, sequences: int, prompt_tokens: int) -> float:
    return 1e3 * model.decode(sequences, prompt_tokens, NEW_TOKENS).step_s_median


def _continued_ms(model: SplitModel, prompts: list[Prompt]) -> float:
    return 1e3 * model.run(prompts, NEW_TOKENS).step_s_median


def _figures(case: str, axis: str, taken: Mapping[str, Samples]) -> Iterator[Figure]:
    """Each size against the one before it, and the largest against the smallest, as if the time were linear in it."""
    sizes = [*taken]
    pairs = [*itertools.pairwise(sizes), (sizes[0], sizes[-1])]
    for small, large in dict.fromkeys(pairs):  # two sizes make one pair
        factor = int(large) / int(small)
        linear = Samples(tuple(factor * value for value in taken[small].values))
        against = f"{factor:g} x that at {small}"
        what = f"step at {large} {axis}"
        yield compared("growth", case, what, taken[large], against, linear, unit="ms", target=1.0)
    if len(sizes) > 2:
        yield _bend(case, axis, taken)


def _bend(case: str, axis: str, taken: Mapping[str, Samples]) -> Figure:
    """What one more of `axis` costs in the last doubling, against the mean before it: above 1 the curve bends upwards.

    A step costs something at size 0 too, which hides a bend from the figures that compare whole steps.
    """
    first, *_, before, last = taken
    what, against = f"one more of {axis}, from {before} to {last}", f"from {first} to {before}"
    slopes = (marginal(taken, before, last), marginal(taken, first, before))
    return compared("growth", case, what, slopes[0], against, slopes[1], unit="ms")


def marginal(taken: Mapping[str, Samples], small: str, large: str) -> Samples:
    """Time per unit of size between two sizes, round by round."""
    pairs = zip(taken[small].values, taken[large].values, strict=True)
    return Samples(tuple((more - less) / (int(large) - int(small)) for less, more in pairs))


def _changed(args: AppConfig, part: str, **values: object) -> AppConfig:
    """`args` with other values in one of its parts, validated anew."""
    document = args.model_dump()
    return parse_args({**document, part: {**document[part], **values}})

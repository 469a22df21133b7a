"""What `router.batch_invariant` costs: decode and prefill with it, against the same without, in 32 and in 16 bits.

The demo model as `make serve` runs it, engine and experts alone, without HTTP and Ray (`split_model`). Both are up at
once and take turns. Prompts are new ones in every run, so nothing is found in a pool. Tokens per second of a prefill:
those of the prompt, over the time to the first token. CPUs without 16-bit arithmetic are slow in bfloat16 either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from cluster.config import AppConfig, parse_args
from infra.bench import models
from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.measure import alternate
from infra.bench.split_model import SplitModel

DTYPES = ("float32", "bfloat16")
CLIENTS = (1, 8, 32)
PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 24, 48, 512
ROUNDS = 3


def run(context: Context) -> Iterator[Figure]:
    """A minute and a half; in a smoke run one size of a small model in one type."""
    model = models.models(context)[0]
    for dtype in DTYPES[:1] if context.smoke else DTYPES:
        context.progress(f"invariance: {model.name}, {dtype}")
        with ExitStack() as stack:
            split = {
                name: stack.enter_context(SplitModel(_changed(model.args, dtype, batch_invariant=on), forked=True))
                for name, on in (("on", True), ("off", False))
            }
            yield from _figures(context, f"{model.name}, {dtype}", split)


def _figures(context: Context, case: str, split: dict[str, SplitModel]) -> Iterator[Figure]:
    new_tokens = NEW_TOKENS // 8 if context.smoke else NEW_TOKENS
    for clients in CLIENTS[:1] if context.smoke else CLIENTS:
        sides = {name: partial(_decode, each, clients, new_tokens) for name, each in split.items()}
        taken = alternate(sides, rounds=context.rounds(ROUNDS))
        what, against = "decode, batch-invariant", "without"
        yield compared(
            "invariance", f"{case}, {clients} clients", what, taken["on"], against, taken["off"], unit="tokens/s"
        )
    prompt_tokens = PREFILL_TOKENS // 8 if context.smoke else PREFILL_TOKENS
    taken = alternate(
        {name: partial(_prefill, each, prompt_tokens) for name, each in split.items()}, rounds=context.rounds(ROUNDS)
    )
    what = f"prefill of {prompt_tokens} tokens, batch-invariant"
    yield compared("invariance", case, what, taken["on"], "without", taken["off"], unit="tokens/s")


def _decode(model: SplitModel, clients: int, new_tokens: int) -> float:
    return model.decode(clients, PROMPT_TOKENS, new_tokens).tokens_per_s


def _prefill(model: SplitModel, prompt_tokens: int) -> float:
    return prompt_tokens / model.decode(1, prompt_tokens, 1).wall_s


def _changed(args: AppConfig, dtype: str, *, batch_invariant: bool) -> AppConfig:
    document = args.model_dump()
    document["model"]["dtype"] = dtype
    document["router"]["batch_invariant"] = batch_invariant
    return parse_args(document)

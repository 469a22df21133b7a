"""The prompts of the first-token side and what it compares; nothing is served."""

from __future__ import annotations

import itertools

from infra.bench import models
from infra.bench.first_token import CLIENTS, PROMPT_TOKENS, SHARED_TOKENS, _continued, _figures, _prompts

MODEL = models.demo()


def test_prompts_with_a_shared_prefix_differ_behind_it_and_in_every_call() -> None:
    (prefix,) = _prompts(MODEL, 1, SHARED_TOKENS)
    sets = [_continued(MODEL, prefix) for _ in range(2)]
    for prompts in sets:
        assert [len(prompt) for prompt in prompts] == [PROMPT_TOKENS] * CLIENTS
        assert all(prompt[:SHARED_TOKENS] == prefix for prompt in prompts)
    # Not even the first page behind the prefix is the same.
    endings = {tuple(prompt[SHARED_TOKENS : SHARED_TOKENS + 16]) for prompt in itertools.chain(*sets)}
    assert len(endings) == 2 * CLIENTS


def test_both_ways_of_finding_a_prefix_have_a_target_for_the_median_only() -> None:
    names = ("reference", "cold", "repeated", "shared, cold", "shared, warm")
    taken = {name: [[0.3, 0.3], [0.3, 0.3]] for name in names}
    taken |= {"repeated": [[0.1, 0.1]], "shared, warm": [[0.15, 0.15]]}
    figures = list(_figures(MODEL, taken, "prefill"))
    cached = [(figure.against, round(figure.ratio or 0, 3), figure.met) for figure in figures if not figure.at_most]
    assert cached == [
        ("the same prompts repeated", 3.0, True),
        ("the same prompts repeated", 3.0, None),
        ("the prefix known, new endings", 2.0, None),
        ("the prefix known, new endings", 2.0, None),
        ("the prefix known, new endings", 2.0, False),
    ]

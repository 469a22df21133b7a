"""How a request becomes sequences, when they end, and which requests are refused. Milliseconds."""

from __future__ import annotations

import pytest

from cluster.errors import RequestError
from deployments.router.sequence import make_sequences
from tests.deployments.router.fake_backbone import EOS, FakeBackbone, make_request

BACKBONE = FakeBackbone(page_tokens=4, num_pages=8, max_context=40)


def finish(tokens: list[int], **sampling: object) -> tuple[int, str | None]:
    """How many of `tokens` are taken after a prompt of three, and why it ended."""
    [sequence] = make_sequences(make_request([1, 2, 3], **sampling), BACKBONE, 0)
    for token in tokens:
        if sequence.finish_reason is None:
            sequence.append(token, BACKBONE.eos_token_ids)
    return len(sequence.tokens) - 3, sequence.finish_reason


def test_the_end_token_ends_with_stop_and_is_kept() -> None:
    assert finish([5, EOS, 6]) == (2, "stop")


def test_ignore_eos_ignores_only_the_models_own_end_tokens() -> None:
    assert finish([5, EOS, 6, 9, 7], ignore_eos=True, stop_token_ids=(9,)) == (4, "stop")


def test_max_tokens_ends_with_length_unless_the_last_token_is_a_stop() -> None:
    assert finish([5, 6, 7], max_tokens=2) == (2, "length")
    assert finish([5, EOS, 7], max_tokens=2) == (2, "stop")


def test_a_full_context_ends_with_length() -> None:
    backbone = FakeBackbone(max_context=5)
    [sequence] = make_sequences(make_request([1, 2, 3], max_tokens=50), backbone, 0)
    assert sequence.limit == 5


def test_max_tokens_counts_from_the_prompt_also_after_a_resume() -> None:
    [sequence] = make_sequences(make_request([1, 2, 3, 8, 9], prompt_tokens=3, max_tokens=4), BACKBONE, 0)
    assert sequence.limit == 7
    assert sequence.output_tokens == 2


def test_choices_are_numbered_and_a_resumed_one_keeps_its_number() -> None:
    assert [s.choice for s in make_sequences(make_request([1], n=3), BACKBONE, 0)] == [0, 1, 2]
    assert [s.choice for s in make_sequences(make_request([1], choice=2), BACKBONE, 0)] == [2]


@pytest.mark.parametrize(
    ("tokens", "options", "param", "words"),
    [
        ([], {}, "messages", "empty"),
        ([1, -1], {}, "messages", "token ids"),
        ([64], {}, "messages", "vocabulary of 64"),
        ([1] * 40, {}, "messages", "40 tokens"),
        ([1], {"logit_bias": {64: 1.0}}, "logit_bias", "vocabulary of 64"),
        ([1, 2, 3], {"prompt_tokens": 1, "max_tokens": 2}, "max_tokens", "nothing to generate"),
        ([1] * 10, {"max_tokens": 24}, "max_tokens", "33 KV tokens, but this router has 32"),
        ([1] * 33, {"max_tokens": 4}, "messages", "36 KV tokens, but this router has 32"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_its_field(
    tokens: list[int], options: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        make_sequences(make_request(tokens, **options), BACKBONE, 0)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_the_largest_request_that_fits_the_pool_is_accepted() -> None:
    [sequence] = make_sequences(make_request([1] * 10, max_tokens=23), BACKBONE, 0)
    assert sequence.limit == 33

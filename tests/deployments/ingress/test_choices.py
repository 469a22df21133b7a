"""One choice: its text does not depend on how tokens were coalesced, and its counts are true (2 s)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.generation import FinishReason, TokenChunk, TokenLogprob
from deployments.ingress.choices import Choice, Delta
from tests.deployments.ingress.fakes import EOS, TOKENIZER


def run(tokens: list[int], cuts: list[int], stops: list[str], end: FinishReason) -> tuple[Choice, list[Delta]]:
    """Push `tokens` in chunks cut at `cuts`; the last chunk carries `end`."""
    choice = Choice(0, TOKENIZER, stops)
    borders = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    deltas = []
    for start, stop in pairwise(borders):
        logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens[start:stop])
        chunk = TokenChunk(0, tuple(tokens[start:stop]), logprobs, end if stop == len(tokens) else None)
        deltas.append(choice.push(chunk))
    return choice, deltas


TOKENS = st.lists(st.integers(5, 399), min_size=1, max_size=30)
CUTS = st.lists(st.integers(1, 30), max_size=6)


@given(TOKENS, CUTS, st.lists(st.sampled_from(["a", "th", " ", "\ufffd\ufffd", "家"]), max_size=2))
def test_coalescing_changes_nothing(tokens: list[int], cuts: list[int], stops: list[str]) -> None:
    one, whole = run(tokens, [], stops, "length")
    many, parts = run(tokens, cuts, stops, "length")
    assert "".join(delta.text for delta in parts) == whole[0].text
    assert [shown for delta in parts for shown in delta.tokens] == list(whole[0].tokens)
    assert (many.completion_tokens, many.finish_reason) == (one.completion_tokens, one.finish_reason)


@given(TOKENS, CUTS)
def test_without_stop_strings_the_text_is_decode_of_all_tokens(tokens: list[int], cuts: list[int]) -> None:
    choice, deltas = run(tokens, cuts, [], "length")
    assert "".join(delta.text for delta in deltas) == TOKENIZER.decode(tokens)
    assert choice.completion_tokens == len(tokens)
    assert len([shown for delta in deltas for shown in delta.tokens]) == len(tokens)


def test_the_token_that_ends_a_choice_is_counted_and_not_shown() -> None:
    for ending in (EOS, TOKENIZER.text_tokens("x")[0]):
        choice, [delta] = run([*TOKENIZER.text_tokens("hi"), ending], [], [], "stop")
        assert (delta.text, delta.finish_reason) == ("hi", "stop")
        assert choice.completion_tokens == len(TOKENIZER.text_tokens("hi")) + 1
        assert len(delta.tokens) == choice.completion_tokens - 1


def test_a_stop_string_wins_over_length_and_ends_the_count() -> None:
    tokens = TOKENIZER.text_tokens("abcdef")
    choice, [delta] = run(tokens, [], ["cd"], "length")
    assert (delta.text, delta.finish_reason, choice.stopped_here) == ("ab", "stop", True)
    assert choice.completion_tokens == 4
    assert choice.push(TokenChunk(0, (5, 6))) == Delta(0, "")
    assert choice.completion_tokens == 4


def test_text_held_back_for_a_stop_string_is_shown_at_the_end() -> None:
    tokens = TOKENIZER.text_tokens("wait ST")
    choice, deltas = run(tokens, list(range(1, 30)), ["STOP"], "length")
    assert "".join(delta.text for delta in deltas[:-1]) == "wait "
    assert (deltas[-1].text, choice.finish_reason) == ("ST", "length")


def test_half_a_character_at_the_end_shows_as_decode_shows_it() -> None:
    tokens = TOKENIZER.text_tokens("👩‍👩")[:1]
    _, deltas = run(tokens, [], [], "length")
    assert deltas[0].text == TOKENIZER.decode(tokens) == "\ufffd"


def test_ids_beyond_the_tokenizer_s_vocabulary_show_nothing() -> None:
    choice, deltas = run([7, 500, 7], [], [], "length")
    assert deltas[0].text == TOKENIZER.decode([7, 7])
    assert choice.completion_tokens == 3

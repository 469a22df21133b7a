"""Incremental detokenisation equals decoding everything at once, and never shows half a character (5 s)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.detokenizer import Detokenizer
from tests.tokenizers import byte_level, sentencepiece_like

BYTES = ChatTokenizer(byte_level())
PIECES = ChatTokenizer(sentencepiece_like())
TEXTS = (
    "专家混合模型，你好世界！",
    "👩‍👩‍👧‍👦 🇨🇳 🎉",
    "e\u0301 n\u0303 a\u0308\u0304",
    "  two  spaces \n\n\ttab",
    "\x00 nul",
    "plain",
    "\ufffd is a character too \ufffd",
    "𝄞 music \U0010ffff",
)


def deltas(tokenizer: ChatTokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.lists(st.integers(0, 399), max_size=60))
def test_any_byte_level_tokens_join_to_what_decode_gives(tokens: list[int]) -> None:
    assert "".join(deltas(BYTES, tokens)) == BYTES.decode(tokens)


@given(st.binary(max_size=60))
def test_any_bytes_join_to_what_decode_gives(data: bytes) -> None:
    """Single-byte tokens only: mostly invalid UTF-8, cut everywhere."""
    token_of = {BYTES.token_bytes(i): i for i in range(400)}
    tokens = [token_of[bytes([byte])] for byte in data]
    assert "".join(deltas(BYTES, tokens)) == BYTES.decode(tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_holds_half_a_character(tokenizer: ChatTokenizer, text: str) -> None:
    tokens = tokenizer.text_tokens(text)
    shown = deltas(tokenizer, tokens)
    assert "".join(shown) == tokenizer.decode(tokens)
    assert "".join(shown).count("\ufffd") == text.count("\ufffd")


@given(st.text(max_size=40))
def test_any_text_survives_a_byte_level_round_trip(text: str) -> None:
    assert "".join(deltas(BYTES, BYTES.text_tokens(text))) == text


@given(st.text(max_size=40))
def test_any_text_through_byte_fallback_joins_to_what_decode_gives(text: str) -> None:
    tokens = PIECES.text_tokens(text)
    assert "".join(deltas(PIECES, tokens)) == PIECES.decode(tokens)


def test_spaces_between_words_survive_a_decoder_that_drops_the_first() -> None:
    tokens = PIECES.text_tokens("the fox")
    assert [delta for delta in deltas(PIECES, tokens) if delta] == ["the", " fox"]


def test_text_is_shown_as_soon_as_its_character_is_whole() -> None:
    tokens = BYTES.text_tokens("ab")
    assert deltas(BYTES, tokens) == ["a", "b", ""]


def test_special_tokens_show_nothing_and_cost_no_memory() -> None:
    detokenizer = Detokenizer(BYTES.decode, BYTES.special_ids)
    assert all(detokenizer.push(1) == "" for _ in range(1000))
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_are_decoded_in_a_bounded_window() -> None:
    longest = 0

    def decode(ids: object) -> str:
        nonlocal longest
        assert isinstance(ids, list)
        longest = max(longest, len(ids))
        return BYTES.decode(ids)

    token_of = {BYTES.token_bytes(i): i for i in range(400)}
    detokenizer = Detokenizer(decode, BYTES.special_ids)
    shown = "".join(detokenizer.push(token_of[b"\x80"]) for _ in range(1000)) + detokenizer.flush()
    assert shown == "\ufffd" * 1000
    assert longest <= 12

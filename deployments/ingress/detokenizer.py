"""Tokens to text, one token at a time, without ever showing half a character.

The text of a token depends on its neighbours: a character may be spread over several byte-level tokens, and
SentencePiece-style decoders drop the space in front of the first token. So a short window of tokens is decoded twice,
without and with what is new, and the difference is shown once it no longer ends in U+FFFD (the technique of
prefix and read offsets that text-generation-inference made common). Knows no tokenizer, only a decode function.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes and a token at least one. What is longer pending than this was never going to
# be a character, so it is cut where a cut is safe; otherwise a run of invalid bytes would be decoded again and again.
_MAX_PENDING = 8


class Detokenizer:
    """Invariant: the texts of all `push` and of the final `flush`, joined, are `decode` of all tokens.

    This holds for byte-level decoders whatever the tokens, and for other decoders on valid UTF-8. (SentencePiece byte
    fallback turns a whole run of byte tokens into U+FFFD when any of it is invalid; that cannot be streamed.)

    silent: ids `decode` skips, the special tokens; they never enter the window, so it stays short.
    """

    def __init__(self, decode: Decode, silent: Container[int]) -> None:
        self._decode = decode
        self._silent = silent
        self._window: list[int] = []
        self._context = 0  # window[:_context] was shown; it is kept for the text of what follows
        self._context_text = ""

    def push(self, token: int) -> str:
        """The text that became certain with `token`; often empty in the middle of a character."""
        if token in self._silent:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._context_text):
            return self._cut_overlong(text)
        return self._show(text, len(self._window))

    def flush(self) -> str:
        """What was held back when generation ended: bytes that no longer become a character show as U+FFFD."""
        return self._show(self._decode(self._window), len(self._window)) if self._window else ""

    def _show(self, text: str, end: int) -> str:
        """Show `text`, the decoded window[:end], beyond the context; window[context:end] is the new context."""
        shown = text[len(self._context_text) :]
        del self._window[: min(self._context, end - 1)]
        self._context = end - min(self._context, end - 1)
        self._context_text = self._decode(self._window[: self._context])
        return shown

    def _cut_overlong(self, text: str) -> str:
        """Nothing, or, where too much is pending, everything before the last safe cut.

        A cut is safe where both sides decode to what they are together: bytes left of it are then not
        continued right of it. A byte-level window always has one within its last 4 tokens.
        """
        if len(self._window) - self._context <= _MAX_PENDING:
            return ""
        for end in range(len(self._window) - 1, self._context, -1):
            head, tail = self._decode(self._window[:end]), self._decode(self._window[end:])
            if tail and head + tail == text:
                break
        else:
            end, head = len(self._window), text
        shown = head[len(self._context_text) :]
        # One token of context is enough here: a byte that continues no character before the cut starts none after it.
        del self._window[: end - 1]
        self._context = 1
        self._context_text = self._decode(self._window[:1])
        return shown

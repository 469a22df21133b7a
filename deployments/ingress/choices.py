"""One choice of a request: token chunks in, text with its log probabilities and one true finish reason out.

Joins detokenisation and stop strings, and counts the tokens that were really used. Knows no HTTP and no other choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.generation import Experts, FinishReason, TokenChunk, TokenLogprob
from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.detokenizer import Detokenizer
from deployments.ingress.stops import StopMatcher


@dataclass(frozen=True)
class ShownToken:
    """A token whose text is shown, at least in part. offset: characters of the choice's text before it."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True)
class Delta:
    """What one chunk added to what a client sees of choice `choice`; any part may be empty.

    experts: as of `TokenChunk`.
    """

    choice: int
    text: str
    tokens: tuple[ShownToken, ...] = ()
    finish_reason: FinishReason | None = None
    experts: Experts | None = None


class Choice:
    """Invariant: after `finish_reason` is set, nothing is shown or counted any more.

    completion_tokens: tokens up to and including the one that ended the choice: the end of sequence, the token that
    completed a stop string, or the last one allowed. stopped_here: a stop string ended it, the router goes on.
    """

    def __init__(self, index: int, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids)
        self._stops = StopMatcher(stops)
        self._known_chars = 0  # detokenised
        self._shown_chars = 0  # and not held back for a stop string
        self._waiting: list[ShownToken] = []
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def stopped_here(self) -> bool:
        """Did a stop string end this choice?"""
        return self._stops.matched

    def push(self, chunk: TokenChunk) -> Delta:
        """Take the next chunk of this choice."""
        if self.cached_tokens is None:
            self.cached_tokens = chunk.cached_tokens
        if self.finish_reason is not None:
            return Delta(self._index, "")
        # The token that ended the choice by itself is counted but never shown.
        visible = len(chunk.tokens) - (chunk.finish_reason == "stop")
        text = ""
        for i, token in enumerate(chunk.tokens):
            self.completion_tokens += 1
            if i >= visible:
                break
            if chunk.logprobs is not None:
                self._waiting.append(ShownToken(self._known_chars, chunk.logprobs[i]))
            text += self._show(self._detokenizer.push(token))
            if self._stops.matched:
                self.finish_reason = "stop"
                return self._delta(text)
        if chunk.finish_reason is not None:
            text += self._show(self._detokenizer.flush())
            rest = self._stops.flush()
            self._shown_chars += len(rest)
            text += rest
            self.finish_reason = "stop" if self._stops.matched else chunk.finish_reason
        return self._delta(text)

    def _show(self, text: str) -> str:
        self._known_chars += len(text)
        shown = self._stops.push(text)
        self._shown_chars += len(shown)
        return shown

    def _delta(self, text: str) -> Delta:
        """With the tokens whose text has begun to show; at the end without a stop string, with all that are left."""
        everything = self.finish_reason is not None and not self._stops.matched
        ready = 0
        while ready < len(self._waiting) and (everything or self._waiting[ready].offset < self._shown_chars):
            ready += 1
        tokens = tuple(self._waiting[:ready])
        del self._waiting[:ready]
        return Delta(self._index, text, tokens, self.finish_reason)

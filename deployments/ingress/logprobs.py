"""Log probabilities in the shapes of OpenAI's two endpoints. Knows no streams and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.choices import ShownToken

# JSON has no infinities: a token the model gives no probability at all is shown as OpenAI shows it.
_FLOOR = -9999.0


def chat_logprobs(tokens: Sequence[ShownToken], tokenizer: ChatTokenizer) -> list[ChatCompletionTokenLogprob]:
    """One entry a token, with its alternatives, most probable first."""
    entries = []
    for shown in tokens:
        top = [
            TopLogprob(token=token_text(raw), bytes=list(raw), logprob=max(logprob, _FLOOR))
            for raw, logprob in ((tokenizer.token_bytes(token), logprob) for token, logprob in shown.logprob.top)
        ]
        raw = tokenizer.token_bytes(shown.logprob.token)
        entry = ChatCompletionTokenLogprob(
            token=token_text(raw), bytes=list(raw), logprob=max(shown.logprob.logprob, _FLOOR), top_logprobs=top
        )
        entries.append(entry)
    return entries


def completion_logprobs(tokens: Sequence[ShownToken], tokenizer: ChatTokenizer) -> Logprobs:
    """Four parallel lists; text_offset counts characters of the choice's text.

    Of alternatives that print alike the most probable is kept: the format's keys are texts.
    """
    tops: list[dict[str, float]] = []
    for shown in tokens:
        top: dict[str, float] = {}
        for token, logprob in shown.logprob.top:
            top.setdefault(token_text(tokenizer.token_bytes(token)), max(logprob, _FLOOR))
        tops.append(top)
    return Logprobs(
        tokens=[token_text(tokenizer.token_bytes(shown.logprob.token)) for shown in tokens],
        token_logprobs=[max(shown.logprob.logprob, _FLOOR) for shown in tokens],
        top_logprobs=tops,
        text_offset=[shown.offset for shown in tokens],
    )


def token_text(raw: bytes) -> str:
    """A token as text; one that is no whole characters as OpenAI writes it: bytes:\\xe4\\xbd."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

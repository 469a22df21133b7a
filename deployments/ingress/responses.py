"""Answers as OpenAI's own types: a whole completion, or the chunks of a streamed one, for each of the two endpoints.

Built from the `openai` package's models, so what is sent is what its client parses. Knows no HTTP and no router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import chat_completion as whole
from openai.types.chat import chat_completion_chunk as streamed
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from deployments.generation import union
from deployments.ingress.chat import ChatTokenizer
from deployments.ingress.choices import Delta, ShownToken
from deployments.ingress.generate import Usage
from deployments.ingress.logprobs import chat_logprobs, completion_logprobs
from deployments.ingress.service import ServedModel

FINGERPRINT_CHARS = 12


def fingerprint(digest: str) -> str:
    """`system_fingerprint` of a model, from its digest in hex."""
    return f"xs-{digest[:FINGERPRINT_CHARS]}"


class Answer(Protocol):
    """How one endpoint shows what was generated."""

    def by(self, digest: str) -> None:
        """The model that answers: while an old version is replaced it may be another than this Ingress is for.

        digest: in hex; "" where it is unknown.
        """
        ...

    def opening(self, choices: int) -> list[BaseModel]:
        """Chunks before any text."""
        ...

    def chunks(self, delta: Delta) -> list[BaseModel]:
        """What is streamed of one delta; empty where it shows nothing."""
        ...

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk of a stream whose client asked for usage."""
        ...

    def complete(self, deltas: Sequence[Delta], usage: Usage) -> BaseModel:
        """The whole answer from one joined, finished delta per choice."""
        ...


class _Common:
    """id: of the completion. logprobs: were they asked for? usage: does every chunk carry a usage field?"""

    def __init__(
        self, id: str, created: int, model: ServedModel, tokenizer: ChatTokenizer, *, logprobs: bool, usage: bool
    ) -> None:
        self._id = id
        self._created = created
        self._model = model
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._fingerprint = model.fingerprint

    def by(self, digest: str) -> None:
        """As of `Answer`."""
        if digest:
            self._fingerprint = fingerprint(digest)


class ChatAnswer(_Common):
    """Shapes of /v1/chat/completions."""

    def opening(self, choices: int) -> list[BaseModel]:
        """One chunk a choice with the role, as OpenAI's streams begin."""
        delta = streamed.ChoiceDelta(role="assistant", content="", refusal=None)
        return [self._chunk(streamed.Choice(index=i, delta=delta, finish_reason=None)) for i in range(choices)]

    def chunks(self, delta: Delta) -> list[BaseModel]:
        """Text first, then the finish reason in a chunk of its own."""
        chunks: list[BaseModel] = []
        if delta.text or delta.tokens:
            choice = streamed.Choice(
                index=delta.choice, delta=streamed.ChoiceDelta(content=delta.text), finish_reason=None
            )
            if self._logprobs:
                choice.logprobs = streamed.ChoiceLogprobs(
                    content=chat_logprobs(delta.tokens, self._tokenizer), refusal=None
                )
            chunks.append(self._chunk(choice))
        if delta.finish_reason is not None:
            end = streamed.Choice(
                index=delta.choice, delta=streamed.ChoiceDelta(), finish_reason=delta.finish_reason, logprobs=None
            )
            chunks.append(self._chunk(end))
        return chunks

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """No choices, only usage."""
        chunk = self._chunk()
        chunk.usage = _usage(usage)
        return chunk

    def complete(self, deltas: Sequence[Delta], usage: Usage) -> BaseModel:
        """The whole chat completion."""
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model.name,
            choices=[self._choice(delta) for delta in deltas],
            usage=_usage(usage),
            system_fingerprint=self._fingerprint,
        )

    def _choice(self, delta: Delta) -> whole.Choice:
        entries = chat_logprobs(delta.tokens, self._tokenizer) if self._logprobs else None
        return whole.Choice(
            index=delta.choice,
            message=ChatCompletionMessage(role="assistant", content=delta.text, refusal=None),
            finish_reason=delta.finish_reason or "stop",
            logprobs=None if entries is None else whole.ChoiceLogprobs(content=entries, refusal=None),
        )

    def _chunk(self, *choices: streamed.Choice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model.name,
            choices=list(choices),
            system_fingerprint=self._fingerprint,
        )
        if self._usage:
            chunk.usage = None  # setting it makes it part of what is sent
        return chunk


class TextAnswer(_Common):
    """Shapes of /v1/completions; a stream's chunks have the shape of the whole."""

    def opening(self, choices: int) -> list[BaseModel]:  # noqa: ARG002 - the protocol's
        """Nothing: there is no role to tell."""
        return []

    def chunks(self, delta: Delta) -> list[BaseModel]:
        """Text and finish reason in one chunk."""
        if not delta.text and not delta.tokens and delta.finish_reason is None:
            return []
        return [self._completion([delta], None)]

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """No choices, only usage."""
        return self._completion([], usage)

    def complete(self, deltas: Sequence[Delta], usage: Usage) -> BaseModel:
        """The whole completion."""
        return self._completion(deltas, usage)

    def _completion(self, deltas: Sequence[Delta], usage: Usage | None) -> Completion:
        completion = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model.name,
            choices=[self._choice(delta) for delta in deltas],
            system_fingerprint=self._fingerprint,
        )
        if usage is not None:
            completion.usage = _usage(usage)
        elif self._usage:
            completion.usage = None  # setting it makes it part of what is sent
        return completion

    def _choice(self, delta: Delta) -> CompletionChoice:
        logprobs = completion_logprobs(delta.tokens, self._tokenizer) if self._logprobs else None
        # OpenAI's type knows no unfinished choice, its streams do: construct() takes null where the type does not.
        return CompletionChoice.construct(
            index=delta.choice, text=delta.text, finish_reason=delta.finish_reason, logprobs=logprobs
        )


def join(deltas: Sequence[Delta]) -> Delta:
    """All deltas of one choice as one."""
    tokens: list[ShownToken] = []
    for delta in deltas:
        tokens.extend(delta.tokens)
    text = "".join(delta.text for delta in deltas)
    experts = union(*(delta.experts for delta in deltas))
    return Delta(deltas[0].choice, text, tuple(tokens), deltas[-1].finish_reason, experts)


def _usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )

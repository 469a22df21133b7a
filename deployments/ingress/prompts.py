"""From a checked body to token ids: template, tokenise, and refuse what cannot fit before spending time on it.

Long texts are tokenised in a thread, so that other requests' streams go on meanwhile. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import RequestError
from deployments.ingress.schemas import ChatBody, CompletionBody
from deployments.ingress.service import Service
from deployments.ingress.validation import MAX_CHOICES, context_error, parse_prompts

T = TypeVar("T")

# About a millisecond of work: below, a thread hop costs as much; above, it would be felt in every running stream.
_LONG_CHARS = 4096
_CHARS_PER_MESSAGE = 100  # rendering a message costs about as much as tokenising that many characters


async def chat_prompt(body: ChatBody, service: Service) -> tuple[int, ...]:
    """Token ids of the whole conversation. Raises RequestError, naming messages or one of them."""
    fields = ("role", "name", "tool_call_id")
    conversation = [
        {field: value for field in fields if (value := getattr(message, field)) is not None} | {"content": message.text}
        for message in body.messages
    ]
    work = sum(len(message["content"]) + _CHARS_PER_MESSAGE for message in conversation)

    def tokenise() -> list[int]:
        text = service.tokenizer.chat_text(conversation)
        _refuse_hopeless(text, "messages", service)
        return service.tokenizer.text_tokens(text, special=False)

    return _not_empty(await _aside(tokenise, work), "messages")


def count_prompts(body: CompletionBody) -> int:
    """How many prompts there are, before any of them is checked."""
    several = isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int)
    return len(body.prompt) if several else 1


async def completion_prompts(body: CompletionBody, service: Service) -> list[tuple[str, tuple[int, ...]]]:
    """(param, token ids) of every prompt. Raises RequestError, naming the prompt."""
    prompts = parse_prompts(body.prompt, service.model.vocab_size)
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        message = f"{len(prompts)} prompts with 'n' = {body.n} make more than {MAX_CHOICES} choices."
        raise RequestError(message, "n", "invalid_value")
    tokenised = []
    for param, prompt in prompts:
        ids = await _text_prompt(prompt, param, service) if isinstance(prompt, str) else prompt
        tokenised.append((param, _not_empty(ids, param)))
    return tokenised


async def _text_prompt(text: str, param: str, service: Service) -> list[int]:
    _refuse_hopeless(text, param, service)
    return await _aside(lambda: service.tokenizer.text_tokens(text), len(text))


def _refuse_hopeless(text: str, param: str, service: Service) -> None:
    least = service.tokenizer.least_tokens(text)
    if least >= service.model.max_context:
        raise context_error(f"at least {least} tokens", param, service.model)


def _not_empty(ids: list[int], param: str) -> tuple[int, ...]:
    if not ids:
        raise RequestError(f"'{param}' is empty: it has no tokens to continue from.", param, "invalid_value")
    return tuple(ids)


async def _aside(work: Callable[[], T], characters: int) -> T:
    return work() if characters < _LONG_CHARS else await asyncio.to_thread(work)

"""Checks that depend on the model: token ids, context length, and what fields mean together.

From a checked body to `SamplingParams` and prompts. Knows no JSON, no tokenizer and no HTTP.
"""

from __future__ import annotations

import secrets
from typing import Any

from cluster.errors import ModelNotFoundError, RequestError
from deployments.generation import SamplingParams
from deployments.ingress.schemas import ChatBody, CompletionBody, GenerationBody
from deployments.ingress.service import ServedModel

MAX_CHOICES = 128
# Dividing logits by less than this only produces infinities: the answer is the greedy one.
_GREEDY_BELOW = 1e-5


def check_body(body: GenerationBody, model: ServedModel) -> None:
    """Raises RequestError for combinations no single field can rule out, and for another model's name."""
    check_model(body.model, model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream': true.", "stream_options", "invalid_value")
    if isinstance(body, ChatBody):
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            message = "Set 'max_completion_tokens' or 'max_tokens', not both."
            raise RequestError(message, "max_tokens", "invalid_value")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true.", "top_logprobs", "invalid_value")
    if isinstance(body, CompletionBody) and body.best_of is not None and body.best_of != (body.n or 1):
        message = "'best_of' is not supported: it may only repeat the value of 'n'."
        raise RequestError(message, "best_of", "unsupported_parameter")


def check_model(name: str, model: ServedModel) -> None:
    """Raises ModelNotFoundError unless `name` is the served model."""
    if name != model.name:
        message = f"The model '{name[:200]}' does not exist here; this server has '{model.name}'."
        raise ModelNotFoundError(message, "model", "model_not_found")


def sampling_params(body: ChatBody | CompletionBody, model: ServedModel, max_tokens: int) -> SamplingParams:
    """The body's sampling fields with defaults filled in and a seed drawn where none was given.

    Raises:
        RequestError: a token id outside the vocabulary.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        seed=draw_seed() if body.seed is None else body.seed,
        n=body.n or 1,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(body.top_k or 0, 0), model.vocab_size),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, model.vocab_size),
        stop_token_ids=_stop_token_ids(body.stop_token_ids or [], model.vocab_size),
        logprobs=body.alternatives,
        ignore_eos=bool(body.ignore_eos),
    )


def draw_seed() -> int:
    """A seed for a client that gave none."""
    return secrets.randbits(63)


def completion_budget(body: GenerationBody, prompt_tokens: int, prompt_param: str, model: ServedModel) -> int:
    """`max_tokens` for a prompt of that length: what was asked for, or what the context leaves.

    Raises:
        RequestError: nothing was left, or less than asked for.
    """
    room = model.max_context - prompt_tokens
    if room < 1:
        raise context_error(f"{prompt_tokens} tokens", prompt_param, model)
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        return room
    if asked > room:
        raise RequestError(
            f"'{name}' is too large: the model's context holds {model.max_context} tokens and the prompt has "
            f"{prompt_tokens}, so at most {room} are possible.",
            name,
            "context_length_exceeded",
        )
    return asked


def context_error(length: str, prompt_param: str, model: ServedModel) -> RequestError:
    """The prompt leaves no room for a completion. length: how long it is, in words."""
    message = f"The prompt has {length}; the model's context holds {model.max_context}, completion included."
    return RequestError(message, prompt_param, "context_length_exceeded")


def parse_prompts(prompt: Any, vocab_size: int) -> list[tuple[str, str | list[int]]]:
    """(param, text or token ids) of every prompt in a completion's `prompt`: string, strings, ids or lists of ids.

    Raises:
        RequestError: `param` names the item that is neither.
    """
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > MAX_CHOICES:
            message = f"'prompt' holds {len(prompt)} prompts; at most {MAX_CHOICES} fit in one request."
            raise RequestError(message, "prompt", "invalid_value")
        return [(f"prompt[{i}]", _one_prompt(item, f"prompt[{i}]", vocab_size)) for i, item in enumerate(prompt)]
    return [("prompt", _one_prompt(prompt, "prompt", vocab_size))]


def _one_prompt(prompt: Any, param: str, vocab_size: int) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        message = f"'{param}' should be a string, a list of token ids, or a list of either."
        raise RequestError(message, param, "invalid_value")
    for i, token in enumerate(prompt):
        if type(token) is not int or not 0 <= token < vocab_size:
            message = f"'{param}[{i}]' should be a token id from 0 to {vocab_size - 1}."
            raise RequestError(message, f"{param}[{i}]", "invalid_value")
    return prompt


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            message = f"'logit_bias': the key {key[:40]!r} is no token id from 0 to {vocab_size - 1}."
            raise RequestError(message, f"logit_bias.{key[:40]}", "invalid_value")
        checked[int(key)] = float(value)
    return checked


def _stop_token_ids(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for i, token in enumerate(ids):
        if token >= vocab_size:
            message = f"'stop_token_ids[{i}]' should be a token id from 0 to {vocab_size - 1}."
            raise RequestError(message, f"stop_token_ids[{i}]", "invalid_value")
    return tuple(ids)

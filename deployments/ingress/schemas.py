"""Request bodies of the HTTP API: OpenAI's fields, the common sampling extensions, and what is refused.

A field is one of three things: used; `Ignored`, where OpenAI documents no effect on the answer; or refused unless it
has a value that asks for nothing (`_Only`). Any other field is an error, so nothing is ever dropped silently. Types are
strict: no "1" for 1, no true for 1. Limits that depend on the model are checked in validation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

MAX_MESSAGES = 4096
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TIMEOUT_S = 86400
MIN_REPETITION_PENALTY = 1e-6  # logits are divided by it: near 0 they would leave float32's range


class Body(BaseModel):
    """Base of every part of a request body."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_keys(cls, value: Any) -> Any:
        # `extra="forbid"` makes an error of every unknown key: far too slow for an object with 300,000 of them.
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = next(key for key in value if key not in cls.model_fields)
            raise PydanticCustomError("too_many_keys", "Unknown field", {"unknown": unknown})
        return value


class _Only:
    """Refuses every value but null and those given: they ask for what happens anyway."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._neutral]}

    def _check(self, value: Any) -> None:
        if value is not None and value not in self._neutral:
            raise PydanticCustomError("unsupported", "This server does not support it")


def _choose(by: Callable[[Any], str | None], message: str) -> Discriminator:
    return Discriminator(by, custom_error_type="wrong_type", custom_error_message=message)


def _text_or_list(value: Any) -> str | None:
    # Tags in angle brackets are left out of `param`: they are no part of the client's own path.
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _bounded(value: Any) -> Any:
    # Before the items: pydantic checks all of a dictionary's items even where its length is wrong.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_long", f"At most {MAX_LOGIT_BIAS} tokens can be biased")
    return value


Ignored = Any
Refused = Annotated[Any, _Only()]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_STOP_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_IDS_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
# What a validator of ours changes or checks is no part of the schema pydantic makes by itself.
Stops = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOPS),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_SCHEMA}]}),
]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_bounded),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,11}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                _IDS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TEXT_SCHEMA},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _IDS_SCHEMA},
            ]
        }
    ),
]


class TextPart(Body):
    """One part of a message's content. Text is all that is understood."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("<list>")],
    _choose(_text_or_list, "Input should be a string or a list of text parts"),
]


class Message(Body):
    """One turn of a chat. What a client may echo from an answer is accepted where it is null or empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[Any, _Only([])] = None
    function_call: Refused = None
    audio: Refused = None
    refusal: Refused = None
    annotations: Annotated[Any, _Only([])] = None

    @property
    def text(self) -> str:
        """The content as one string; parts become paragraphs of one line each."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Body):
    """include_obfuscation: padding against traffic analysis in OpenAI's service; here there is none to switch off."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationBody(Body):
    """What both endpoints share. None means that the client left the field out."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, max_length=64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY)] | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: Ignored = None
    tools: Annotated[Any, _Only([])] = None
    tool_choice: Annotated[Any, _Only("none")] = None
    functions: Annotated[Any, _Only([])] = None
    function_call: Annotated[Any, _Only("none")] = None
    response_format: Annotated[Any, _Only({"type": "text"})] = None
    modalities: Annotated[Any, _Only(["text"])] = None
    audio: Refused = None
    prediction: Refused = None
    reasoning_effort: Annotated[Any, _Only("none")] = None
    verbosity: Refused = None
    web_search_options: Refused = None
    moderation: Refused = None

    @property
    def alternatives(self) -> int | None:
        """SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is checked in validation.py: its errors should name the item."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Annotated[Any, _Only(False)] = None
    suffix: Annotated[Any, _Only("")] = None
    best_of: Ignored = None

    @property
    def alternatives(self) -> int | None:
        """SamplingParams.logprobs."""
        return self.logprobs

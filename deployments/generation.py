"""What the Ingress asks of a Router, and what comes back: plain data, no torch, no HTTP.

One `GenerationRequest` yields, over a streaming Serve handle, `TokenChunk`s until every choice has a finish
reason, or ends with one exception from `cluster.errors`. Where there is nothing else to say, a `Pulse` says that the
router lives. Nothing else ever comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]
Experts = Mapping[int, tuple[int, ...]]
"""Layer -> expert ids, both ascending."""


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens. Every field was validated by the Ingress; `seed` is always drawn.

    temperature: 0 means greedy. top_k: 0 means off. top_p: 1 means off. min_p: 0 means off.
    logprobs: None for none, else the number of alternatives (0..20) to report beside the chosen token.
    stop_token_ids end a choice in addition to the model's end-of-sequence tokens;
    `ignore_eos` disables the latter only.
    """

    max_tokens: int
    seed: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One accepted request.

    request_id: unique; cancelling goes by it.
    tokens: the prompt, at least one id, followed on a resume by the tokens already delivered.
    prompt_tokens: how many of `tokens` are the client's prompt. Penalties tell prompt and output apart by it, and
        sampling noise is a function of (seed, choice, position), so a resumed request continues with the same tokens.
    timeout_s: seconds from acceptance by the router after which the request fails with DeadlineError; None for never.
    choice: with n == 1, the index of the choice being generated (a resume of one choice of several).
    vocabulary: of `Blueprint`: a router of another one would read other words in these tokens; "" for any.
    digest: of the model that must answer, in hex, because it gave tokens already; "" for any of this vocabulary.
    show_experts: whether chunks are to say which experts their tokens went to.
    trace: the `traceparent` of the span that this belongs to; "" where it is not traced.
    accepted: part of what was accepted already, a resume or one more prompt of the same HTTP request: it may wait.
    x_request_id: of the HTTP request it is part of, for lines of the log; many may have the same, "" is none.
    """

    request_id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    prompt_tokens: int
    timeout_s: float | None = None
    choice: int = 0
    vocabulary: str = ""
    digest: str = ""
    accepted: bool = False
    show_experts: bool = False
    trace: str = ""
    x_request_id: str = ""


@dataclass(frozen=True)
class Pulse:
    """A sign of life: the first message of every answer, then one for each second without tokens.

    It is missing where the router's process hangs, and where the thread that computes does. A request that waits for
    its turn, for a long prompt or for lost experts gets it.
    router: id of the Router replica.
    """

    router: str


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one emitted token under the raw model distribution, and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenChunk:
    """One or more tokens of one choice, in order. Several tokens are coalesced when the consumer lags.

    The token that ended a choice with finish_reason "stop" (end of sequence or a stop token id) is included in
    `tokens` and counted in usage; the Ingress does not show it as text.
    cached_tokens: prompt tokens whose keys and values were reused, on the first chunk of a choice.
    digest: of the router's model, in hex, on the first chunk of an answer: whoever goes on must have the same.
    experts: where they were asked for, those that the tokens computed for this chunk went to. That is the last token
        before each of `tokens`, and with the first chunk of a choice all of the prompt that was not reused; again all
        of it where another router goes on, or after a preemption.
    """

    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    digest: str = ""
    experts: Experts | None = None


def union(*used: Experts | None) -> Experts | None:
    """All experts of all of them; None where nothing is known.

    >>> union(None, {1: (4, 7)}, {1: (5, 7), 2: (0,)}), union(None, None)
    ({1: (4, 5, 7), 2: (0,)}, None)
    """
    known = [each for each in used if each is not None]
    if len(known) < 2:
        return known[0] if known else None
    layers = sorted({layer for each in known for layer in each})
    return {layer: tuple(sorted({i for each in known for i in each.get(layer, ())})) for layer in layers}

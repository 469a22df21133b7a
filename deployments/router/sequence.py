"""One choice being generated: its tokens, how many of them are computed, its pages, and when it ends.

Knows no torch, no queue and no pool. Lengths are in tokens and obey

    0 <= computed < len(tokens) <= limit        while it runs; the tokens [computed, len(tokens)) await a step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import RequestError
from deployments.generation import FinishReason, GenerationRequest, TokenChunk, TokenLogprob
from deployments.router.page_pool import page_digest
from deployments.router.step import BackboneLike

if TYPE_CHECKING:
    from deployments.router.routing import Shown


@dataclass(eq=False)
class Sequence:
    """The state of one choice of a request.

    arrival: order of arrival; lower is older. limit: the length at which it ends with "length".
    leader: the choice of the same request that computes the prompt; this one waits and reuses its pages.
    cached_tokens: prompt tokens found in the pool when it was first admitted.
    awaited_since_s: when its next token began to be waited for: its submission, or its last token.
    shown: where the rows of its prompt went; None as long as nobody has seen.
    experts: layer -> those used since its last chunk, where the request asks for them.
    """

    request: GenerationRequest
    choice: int
    arrival: int
    limit: int
    leader: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    admitted: bool = False
    emitted: bool = False
    awaited_since_s: float = 0.0
    shown: Shown | None = None
    experts: dict[int, set[int]] = field(default_factory=dict)
    finish_reason: FinishReason | None = None

    @property
    def remaining(self) -> int:
        """Tokens that await a step; 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def output_tokens(self) -> int:
        """Tokens after the client's prompt, those delivered before a resume included: the position of the next one."""
        return len(self.tokens) - self.request.prompt_tokens

    @property
    def held(self) -> bool:
        """Whether to wait for the leader, whose prompt is not computed yet."""
        leader = self.leader
        return leader is not None and leader.finish_reason is None and leader.computed < len(leader.request.tokens)

    def digests_of(self, pages: int, page_tokens: int) -> list[bytes]:
        """The digest chain of its first `pages` full pages; tokens only ever grow, so it is computed once."""
        while len(self.digests) < pages:
            start = len(self.digests) * page_tokens
            previous = self.digests[-1] if self.digests else b""
            self.digests.append(page_digest(previous, self.tokens[start : start + page_tokens]))
        return self.digests[:pages]

    def append(self, token: int, eos_token_ids: frozenset[int], logprob: TokenLogprob | None = None) -> TokenChunk:
        """Add a sampled token, decide whether it ends the choice, and return the chunk that says so."""
        cached = 0 if self.emitted else self.cached_tokens
        self.emitted = True
        self.tokens.append(token)
        sampling = self.request.sampling
        if token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        logprobs = None if logprob is None else (logprob,)
        used, self.experts = self.experts, {}
        experts = {layer: tuple(sorted(used[layer])) for layer in sorted(used)} or None
        return TokenChunk(self.choice, (token,), logprobs, self.finish_reason, cached, experts=experts)


def make_sequences(
    request: GenerationRequest, backbone: BackboneLike, arrival: int, now: float = 0.0
) -> list[Sequence]:
    """The choices of a request submitted `now`, the leader first; `arrival` of the first, the others follow it.

    Raises:
        RequestError: the request can never run on this model and pool; `param` names the field.
    """
    limit = _limit(request, backbone)
    first = request.choice if request.sampling.n == 1 else 0
    sequences: list[Sequence] = []
    for index in range(request.sampling.n):
        leader = sequences[0] if sequences else None
        sequence = Sequence(request, first + index, arrival + index, limit, leader, list(request.tokens))
        sequence.awaited_since_s = now
        sequences.append(sequence)
    return sequences


def _limit(request: GenerationRequest, backbone: BackboneLike) -> int:
    """The length at which its choices end, once everything that could fail in the middle of a step is excluded."""
    length, sampling = len(request.tokens), request.sampling
    if not 1 <= request.prompt_tokens <= length or min(request.tokens) < 0:
        raise RequestError("The prompt is empty or not made of token ids.", "messages")
    if max(request.tokens) >= backbone.vocab_size:
        raise RequestError(f"The prompt has a token id beyond the vocabulary of {backbone.vocab_size}.", "messages")
    if any(not 0 <= token < backbone.vocab_size for token in sampling.logit_bias):
        raise RequestError(f"A token id is beyond the vocabulary of {backbone.vocab_size}.", "logit_bias")
    if length >= backbone.max_context:
        raise RequestError(
            f"The prompt has {length} tokens, but the context holds {backbone.max_context}, output included.",
            "messages",
            "context_length_exceeded",
        )
    limit = min(request.prompt_tokens + sampling.max_tokens, backbone.max_context)
    if length >= limit:
        raise RequestError(f"max_tokens ({sampling.max_tokens}) leaves nothing to generate.", "max_tokens")
    # The last token is never fed back, so its keys and values need no room.
    pool = backbone.num_pages * backbone.page_tokens
    if limit - 1 > pool:
        param = "messages" if length > pool else "max_tokens"
        raise RequestError(f"Prompt and max_tokens need {limit - 1} KV tokens, but this router has {pool}.", param)
    return limit

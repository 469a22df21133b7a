"""Which Router replica gets a request: the one that has its session or prompt prefix in the KV cache, if it can.

Pure ranking first, then the class that Serve calls. Rendezvous hashing (Thaler and Ravishankar 1998): every handle
ranks the replicas the same way without talking to the others, and a replica that comes or goes moves only its own keys.
Bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018): a replica much busier than the mean is passed over for the
next in the ranking, so that a popular prefix spreads over as many replicas as it needs and no more.
Requests without a key go to the less busy of two random replicas. A replica that has fallen silent comes last.

While a new version replaces an old one a request waits for routers that understand it, but not for ever: see `Absence`.
"""

from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import whereabouts
from deployments.generation import GenerationRequest

PREFIX_TOKENS = 64
"""Prompt tokens that name a prefix; a shorter prompt is cheaper to compute than to queue for."""

OVERLOAD_FACTOR = 1.25
OVERLOAD_SLACK = 2
"""A replica with more than 1.25 x mean + 2 requests is passed over: with a mean of 8, from 13 on."""

NOBODY_S = 60.0
"""As long as a new router waits for its Ingress, see `rollout.py`."""

Id = TypeVar("Id", bound=Hashable)


def affinity_key(session_id: str, prompt: Sequence[int]) -> bytes | None:
    """What requests that should meet have in common: the session, else the first `PREFIX_TOKENS` tokens, or nothing."""
    if session_id:
        return b"session\0" + session_id.encode("utf-8", "surrogatepass")
    if len(prompt) < PREFIX_TOKENS:
        return None
    return b"prefix\0" + hashlib.blake2b(array("q", prompt[:PREFIX_TOKENS]).tobytes(), digest_size=16).digest()


def rank(
    key: bytes | None, queues: Mapping[Id, int | None], names: Mapping[Id, str], chance: random.Random
) -> list[list[Id]]:
    """Replicas in the order they should be tried; within one list the shortest queue wins.

    queues: replica -> requests it has, None where unknown, which counts as not overloaded. names: what is hashed.
    """
    if key is None:
        pair = chance.sample(list(queues), min(2, len(queues)))
        return [pair, [replica for replica in queues if replica not in pair]]
    order = sorted(queues, key=lambda replica: _score(key, names[replica]), reverse=True)
    limit = overload_limit([length for length in queues.values() if length is not None])
    fit = [replica for replica in order if (queues[replica] or 0) <= limit]
    return [[replica] for replica in fit] + [[replica for replica in order if replica not in fit]]


def overload_limit(lengths: Sequence[int]) -> float:
    """The longest queue a preferred replica may have."""
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    return OVERLOAD_FACTOR * mean + OVERLOAD_SLACK


def _score(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(key, key=name.encode()[:64], digest_size=8).digest()


class Absence:
    """Since when no router has understood the words of a request, as far as requests have asked. clock: seconds.

    A gap in the asking counts as none: routers may have come and gone meanwhile.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spans: dict[str, tuple[float, float]] = {}  # vocabulary -> first and last time that nobody was there

    def over_for(self, vocabulary: str) -> None:
        """There is a router of this vocabulary."""
        self._spans.pop(vocabulary, None)

    def is_long(self, vocabulary: str) -> bool:
        """There is none now; has there been none for `NOBODY_S`?"""
        now = self._clock()
        since, last = self._spans.get(vocabulary, (now, now))
        if now - last > NOBODY_S:
            since = now
        self._spans[vocabulary] = (since, now)
        return now - since >= NOBODY_S


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Serve's adapter. Not a FIFOMixin: that hands the replica chosen for one request to whichever waits longest."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve after construction."""
        self._chance = random.Random()
        self._absence = Absence(time.monotonic)
        # Through its module: Serve pickles this class and whatever globals it names by value, which would be a copy.
        self._whereabouts = whereabouts.WHEREABOUTS

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve tries the lists in order and probes queues it does not know; when all are full it backs off and asks
        again."""
        key = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            key = _key_of(pending_request)
            candidate_replicas = _able(candidate_replicas, pending_request, self._absence)
        if not candidate_replicas:
            return []  # Serve asks again when there are others
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        names = {replica_id: replica_id.unique_id for replica_id in replicas}
        suspects = self._whereabouts.suspects()
        silent = [replica_id for replica_id in replicas if names[replica_id] in suspects]
        for replica_id in silent:
            # Where all others are full, Serve shall ask a silent one for its queue first: no answer, no request.
            self.replica_queue_len_cache.invalidate_key(replica_id)
        queues = {each: self.replica_queue_len_cache.get(each) for each in replicas if each not in silent}
        ranked = [*rank(key, queues, names, self._chance), silent]
        return [[replicas[replica_id] for replica_id in level] for level in ranked if level]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Serve sends the request right after this returns; with `is_retry` the replica it was sent to refused it."""
        request = _request_of(pending_request)
        if request is not None:
            self._whereabouts.withdraw(request.request_id)
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if request is not None:
            self._whereabouts.place(request.request_id, replica.replica_id.unique_id)
        return replica

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> PendingRequest | None:
        # Ray 2.60 indexes waiting calls by the id of the HTTP request they come from, so of two concurrent calls from
        # one request (two prompts of a completion) the second is never found again and waits for ever. The metadata
        # object is one per call.
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None


def _able(candidates: list[RunningReplica], pending: PendingRequest, absence: Absence) -> list[RunningReplica]:
    """Those that may answer the request: while a new version replaces an old one there are routers of both.

    A request whose model nobody has any more goes to anybody, who refuses it: it would wait for ever. So does one
    whose words nobody has understood for long: its own routers may be on their way, or may never come.
    """
    request = _request_of(pending)
    if request is None:
        return candidates
    able = [replica for replica in candidates if may_answer(request, replica.replica_metadata)]
    if able:
        absence.over_for(request.vocabulary)
        return able
    return candidates if request.digest or absence.is_long(request.vocabulary) else []


def may_answer(request: GenerationRequest, router: Mapping[str, Any]) -> bool:
    """Whether a router of this "digest" and "vocabulary" (both may be unsaid) is one that the request can go to."""
    digest, vocabulary = router.get("digest", ""), router.get("vocabulary", "")
    same_words = not request.vocabulary or not vocabulary or request.vocabulary == vocabulary
    return same_words and (not request.digest or not digest or request.digest == digest)


def _request_of(pending: PendingRequest) -> GenerationRequest | None:
    request = pending.args[0] if pending.args else pending.kwargs.get("request")
    return request if isinstance(request, GenerationRequest) else None


def _key_of(pending: PendingRequest) -> bytes | None:
    request = _request_of(pending)
    if request is None:
        return affinity_key(pending.metadata.session_id, ())
    return affinity_key(pending.metadata.session_id, request.tokens[: min(request.prompt_tokens, PREFIX_TOKENS)])

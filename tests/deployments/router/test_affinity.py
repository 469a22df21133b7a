"""Ranking of Router replicas: same key, same replica, unless that one is much busier. About two seconds, no Ray."""

import asyncio
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.request_router.common import ReplicaQueueLengthCache
from ray.serve.request_router import RequestRouter

from deployments.generation import GenerationRequest, SamplingParams
from deployments.router.affinity import (
    NOBODY_S,
    PREFIX_TOKENS,
    Absence,
    AffinityRouter,
    _able,
    affinity_key,
    may_answer,
    overload_limit,
    rank,
)
from deployments.whereabouts import Whereabouts

CHANCE = random.Random(0)
KEYS = st.binary(min_size=1, max_size=40)
QUEUES = st.dictionaries(
    st.text("abcdef0123456789", min_size=1, max_size=8), st.none() | st.integers(0, 50), max_size=6
)


def ranked(key, queues):
    return rank(key, queues, {replica: replica for replica in queues}, CHANCE)


def first(key, replicas):
    return ranked(key, dict.fromkeys(replicas, 0))[0][0]


def test_a_session_names_the_key_and_else_the_prefix_does():
    prompt = tuple(range(100))
    assert affinity_key("s", prompt) == affinity_key("s", ())
    assert affinity_key("s", ()) != affinity_key("t", ())
    assert affinity_key("", prompt) == affinity_key("", (*prompt[:PREFIX_TOKENS], 7))
    assert affinity_key("", prompt) != affinity_key("", (1, *prompt[1:]))
    assert affinity_key("", prompt[: PREFIX_TOKENS - 1]) is None


def test_a_session_cannot_pass_for_a_prefix_and_may_be_any_text():
    prompt = tuple(range(PREFIX_TOKENS))
    key = affinity_key("", prompt)
    assert key is not None
    assert affinity_key(key.decode("latin-1"), ()) != key
    assert affinity_key("\ud800 \0 雪", ()) is not None


@given(KEYS | st.none(), QUEUES)
def test_every_replica_is_tried_once(key, queues):
    assert sorted(replica for level in ranked(key, queues) for replica in level) == sorted(queues)


@given(KEYS, QUEUES, st.randoms())
def test_the_ranking_of_a_key_does_not_depend_on_the_order_replicas_are_listed_in(key, queues, chance):
    shuffled = list(queues.items())
    chance.shuffle(shuffled)
    assert ranked(key, queues)[: len(queues)] == ranked(key, dict(shuffled))[: len(queues)]


@given(KEYS, QUEUES)
def test_a_replica_beyond_the_limit_is_only_a_last_resort(key, queues):
    limit = overload_limit([length for length in queues.values() if length is not None])
    *preferred, rest = ranked(key, queues)
    assert all((queues[replica] or 0) <= limit for level in preferred for replica in level)
    assert all((queues[replica] or 0) > limit for replica in rest)
    assert bool(preferred) == bool(queues)


def test_a_replica_that_comes_or_goes_moves_only_its_own_keys():
    keys = [str(index).encode() for index in range(2000)]
    three, four = "abc", "abcd"
    moved = Counter((first(key, three), first(key, four)) for key in keys if first(key, three) != first(key, four))
    assert {new for _, new in moved} == {"d"}
    assert 400 < sum(moved.values()) < 600


def test_keys_spread_evenly():
    counts = Counter(first(str(index).encode(), "abcd") for index in range(4000))
    assert all(900 < count < 1100 for count in counts.values())


def test_a_popular_key_spreads_over_as_many_replicas_as_it_needs():
    queues = dict.fromkeys("abcd", 0)
    for _ in range(100):
        queues[ranked(b"popular", queues)[0][0]] += 1
    assert max(queues.values()) <= overload_limit(list(queues.values())) + 1
    few = dict.fromkeys("abcd", 0)
    for _ in range(2):
        few[ranked(b"popular", few)[0][0]] += 1
    assert sorted(few.values()) == [0, 0, 0, 2]


@pytest.mark.parametrize(("lengths", "limit"), [([], 2), ([0, 0], 2), ([8, 8], 12), ([6, 0], 5.75)])
def test_the_limit_is_a_quarter_above_the_mean_and_two(lengths, limit):
    assert overload_limit(lengths) == limit


def test_without_a_key_two_random_replicas_compete_and_the_others_wait():
    pairs = Counter(frozenset(ranked(None, dict.fromkeys("abc", 0))[0]) for _ in range(300))
    assert len(pairs) == 3
    assert all(len(pair) == 2 for pair in pairs)
    assert ranked(None, {"a": 0}) == [["a"], []]


@pytest.mark.parametrize(
    ("vocabulary", "digest", "may"),
    [
        ("v", "", True),
        ("", "", True),
        ("w", "", False),  # another tokenizer, or another name: its tokens mean something else there
        ("v", "d", True),
        ("v", "e", False),  # it has tokens of another model already
        ("", "d", True),
    ],
)
def test_a_request_goes_to_routers_that_understand_it_and_once_begun_to_those_of_its_model(vocabulary, digest, may):
    request = GenerationRequest(
        "r", (1,), SamplingParams(max_tokens=1, seed=0), 1, vocabulary=vocabulary, digest=digest
    )
    assert may_answer(request, {"vocabulary": "v", "digest": "d"}) is may
    assert may_answer(request, {})


DEPLOYMENT = DeploymentID("Router")


def test_a_request_waits_for_routers_that_understand_it_but_not_for_ever():
    now = [0.0]
    absence = Absence(lambda: now[0])
    old = SimpleNamespace(replica_metadata={"vocabulary": "old", "digest": "o"})
    new = SimpleNamespace(replica_metadata={"vocabulary": "new", "digest": "n"})

    def to(*routers, vocabulary="new", digest="", after_s=0.0):
        now[0] += after_s
        request = GenerationRequest(
            "r", (1,), SamplingParams(max_tokens=1, seed=0), 1, vocabulary=vocabulary, digest=digest
        )
        return _able(list(routers), SimpleNamespace(args=[request], kwargs={}), absence)

    assert to(old) == []
    assert to(old, vocabulary="old") == [old], "one is there for the others"
    assert to(old, after_s=NOBODY_S / 2) == []
    assert to(old, new) == [new]
    assert to(old, after_s=NOBODY_S / 2) == [], "counted from anew: there has been one"
    assert to(old, after_s=NOBODY_S / 2) == []
    assert to(old, after_s=NOBODY_S / 2) == [old], "somebody must refuse it"
    assert to(old) == [old], "and those behind it at once"
    assert to(old, new) == [new]
    assert to(old, after_s=2 * NOBODY_S) == []
    assert to(old, after_s=2 * NOBODY_S) == [], "nobody has asked meanwhile: there may have been some"
    assert to(old, digest="gone") == [old], "who began elsewhere does not wait"


def replica(name):
    return SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), replica_metadata={})


def pending_of(session):
    request = GenerationRequest("call", (1, 2), SamplingParams(max_tokens=1, seed=0), prompt_tokens=2)
    metadata = SimpleNamespace(session_id=session)
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(args=[request], kwargs={}, metadata=metadata, routing_context=context)


def adapter():
    """The adapter without Serve's machinery behind it."""
    router = AffinityRouter.__new__(AffinityRouter)
    router.initialize_state()
    router._whereabouts = Whereabouts(lambda: 0.0)
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    return router


def choice(router, names, session):
    levels = asyncio.run(router.choose_replicas([replica(name) for name in names], pending_of(session)))
    return [[each.replica_id.unique_id for each in level] for level in levels]


@pytest.mark.parametrize("session", ["", *(f"s{index}" for index in range(20))])
def test_a_silent_replica_comes_last_whatever_prefers_it_and_is_asked_before_it_gets_anything(session):
    router = adapter()
    for name in "abc":
        router._replica_queue_len_cache.update(ReplicaID(name, DEPLOYMENT), 0)
    router._whereabouts.suspect("b")
    *trusted, last = choice(router, "abc", session)
    assert last == ["b"]
    assert sorted(name for level in trusted for name in level) == ["a", "c"]
    # Serve probes those whose queue it does not know.
    assert router.replica_queue_len_cache.get(ReplicaID("b", DEPLOYMENT)) is None
    assert router.replica_queue_len_cache.get(ReplicaID("a", DEPLOYMENT)) == 0


def test_a_silent_replica_is_all_there_is_where_there_is_no_other():
    router = adapter()
    router._whereabouts.suspect("b")
    assert choice(router, "b", "s") == [["b"]]


def test_each_call_s_replica_is_known_from_when_it_is_sent_until_it_is_refused(monkeypatch):
    seen = []

    async def choose(self, _pending_request, *, is_retry=False):
        seen.append(self._whereabouts.placed("call"))
        return replica("b" if is_retry else "a")

    monkeypatch.setattr(RequestRouter, "_choose_replica_for_request", choose)
    router = adapter()
    for is_retry in (False, True):
        asyncio.run(router._choose_replica_for_request(pending_of("s"), is_retry=is_retry))
        seen.append(router._whereabouts.placed("call").router)
    assert seen == [None, "a", None, "b"]

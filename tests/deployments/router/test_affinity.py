"""Ranking of Router replicas: same key, same replica, unless that one is much busier. About two seconds, no Ray."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.router.affinity import PREFIX_TOKENS, affinity_key, overload_limit, rank

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

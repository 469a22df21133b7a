"""Shares follow speed within room and miss nobody; the experts of a layer are dealt once each."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement
from cluster.sizing.spread import deal, shares

DEVICES = st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 10)), min_size=1, max_size=8)


def test_shares_follow_speed():
    assert shares(12, [100, 100], [1.0, 3.0]) == [3, 9]
    assert shares(10, [100, 100, 100], [1.0, 1.0, 1.0]) == [4, 3, 3]


def test_what_a_full_device_cannot_take_goes_to_the_others():
    assert shares(12, [100, 4], [1.0, 3.0]) == [8, 4]
    assert shares(12, [8, 4], [1.0, 3.0]) == [8, 4]


@given(DEVICES, st.floats(0, 1))
def test_shares_sum_to_the_places_and_none_exceeds_its_room(devices, filled):
    room, speeds = zip(*devices, strict=True)
    places = int(sum(room) * filled)
    found = shares(places, room, speeds)
    assert sum(found) == places
    assert all(0 <= share <= most for share, most in zip(found, room, strict=True))


@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_every_expert_is_dealt_once_and_layers_differ_by_one_at_most(layers, experts, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, layers * experts), max_size=5)))
    edges = [0, *cuts, layers * experts]
    parts = [stop - start for start, stop in pairwise(edges) if stop > start]
    counts = dict.fromkeys(range(layers), experts)
    groups = deal(counts, parts)
    Placement(counts, groups)  # a partition, or it raises
    for group, part in zip(groups, parts, strict=True):
        held = [len(group.get(layer, ())) for layer in counts]
        assert sum(held) == part
        assert max(held) - min(held) <= 1


def test_layers_of_different_size_are_dealt_whole():
    counts = {1: 2, 3: 5}
    groups = deal(counts, [4, 3])
    assert groups == ({1: (0, 1), 3: (0, 1)}, {3: (2, 3, 4)})
    Placement(counts, groups)


def test_the_example_of_the_docstring():
    a, b, c = deal({0: 4, 1: 4, 2: 4}, [5, 4, 3])
    assert (a, b, c) == ({0: (0, 1), 1: (0, 1), 2: (0,)}, {0: (2,), 1: (2,), 2: (1, 2)}, {0: (3,), 1: (3,), 2: (3,)})

"""Placements are partitions, balanced ones are balanced, and a wrong one is explained. About three seconds."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.placement import Placement, balanced, contiguous, explicit, hot_aligned, read_groups, read_load

LAYERS = st.dictionaries(st.integers(0, 80), st.integers(1, 40), min_size=1, max_size=4)


@st.composite
def layers_and_groups(draw):
    layers = draw(LAYERS)
    return layers, draw(st.integers(1, min(layers.values())))


@st.composite
def loads(draw):
    layers, groups = draw(layers_and_groups())
    weight = st.floats(0, 1e6, allow_nan=False)
    return layers, groups, {layer: draw(st.lists(weight, min_size=n, max_size=n)) for layer, n in layers.items()}


def assert_partition(placement, layers):
    for layer, count in layers.items():
        held = [expert for group in placement.groups for expert in group.get(layer, ())]
        assert sorted(held) == list(range(count))
        for index, group in enumerate(placement.groups):
            assert list(group.get(layer, ())) == sorted(group.get(layer, ()))
            assert all(placement.owner[layer][expert] == index for expert in group.get(layer, ()))


@given(layers_and_groups())
def test_contiguous_runs_differ_by_at_most_one_expert(case):
    layers, groups = case
    placement = contiguous(layers, groups)
    assert_partition(placement, layers)
    for layer in layers:
        assert list(placement.owner[layer]) == sorted(placement.owner[layer])
        sizes = [len(group[layer]) for group in placement.groups]
        assert max(sizes) - min(sizes) <= 1


def test_six_experts_in_four_groups():
    assert [group[0] for group in contiguous({0: 6}, 4).groups] == [(0,), (1, 2), (3,), (4, 5)]


@given(loads())
def test_balanced_groups_are_equal_in_number_and_never_worse_than_one_expert_apart(case):
    layers, groups, load = case
    placement = balanced(layers, groups, load)
    assert_partition(placement, layers)
    for layer, count in layers.items():
        sizes = [len(group[layer]) for group in placement.groups]
        assert max(sizes) - min(sizes) <= 1
        if count % groups == 0 and count // groups == 1:
            continue
        heaviest = max(sum(load[layer][expert] for expert in group[layer]) for group in placement.groups)
        # Even the worst packing holds ceil(count / groups) of the heaviest experts.
        assert heaviest <= sum(sorted(load[layer], reverse=True)[: -(-count // groups)]) * (1 + 1e-9) + 1e-9


def test_balanced_separates_the_two_hot_experts_that_contiguous_puts_together():
    load = {0: [10.0, 9.0, 1.0, 1.0]}
    assert contiguous({0: 4}, 2).groups[0][0] == (0, 1)
    assert [group[0] for group in balanced({0: 4}, 2, load).groups] == [(0, 3), (1, 2)]


@given(loads())
def test_hot_aligned_groups_are_equal_in_number_and_every_expert_is_as_hot_as_any_of_a_later_group(case):
    layers, groups, load = case
    placement = hot_aligned(layers, groups, load)
    assert_partition(placement, layers)
    for layer in layers:
        sizes = [len(group[layer]) for group in placement.groups]
        assert sizes == sorted(sizes)
        assert sizes[-1] - sizes[0] <= 1
        for hotter, colder in pairwise(placement.groups):
            assert min(load[layer][e] for e in hotter[layer]) >= max(load[layer][e] for e in colder[layer])


def test_hot_aligned_puts_the_hottest_of_every_layer_into_the_first_group():
    load = {0: [1.0, 9.0, 2.0, 8.0, 1.0, 0.0], 1: [5.0, 1.0, 1.0, 1.0, 1.0, 6.0]}
    placement = hot_aligned({0: 6, 1: 6}, 4, load)
    assert [group[0] for group in placement.groups] == [(1,), (3,), (0, 2), (4, 5)]
    assert [group[1] for group in placement.groups] == [(5,), (0,), (1, 2), (3, 4)]


@pytest.mark.parametrize("make", [balanced, hot_aligned])
@pytest.mark.parametrize("load", [{}, {0: [1.0]}, {0: [1.0, -1.0]}, {0: [1.0, float("nan")]}, {0: [1.0, float("inf")]}])
def test_loads_that_are_missing_negative_or_not_finite_are_refused(load, make):
    with pytest.raises(PlacementError, match="2 finite loads of at least 0 for layer 0"):
        make({0: 2}, 2, load)


@pytest.mark.parametrize("groups", [0, 9])
@pytest.mark.parametrize("make", [contiguous, lambda layers, groups: balanced(layers, groups, {0: [1.0] * 8})])
def test_there_are_at_most_as_many_groups_as_experts(make, groups):
    with pytest.raises(PlacementError, match=f"experts.groups: {groups} groups, but a layer has 8 .* 1 to 8"):
        make({0: 8}, groups)


@given(layers_and_groups(), st.data())
def test_an_explicit_placement_is_taken_as_written_in_any_order(case, data):
    layers, groups = case
    written = [
        {layer: data.draw(st.permutations(ids)) for layer, ids in g.items()} for g in contiguous(layers, groups).groups
    ]
    assert explicit(layers, written) == contiguous(layers, groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{0: [0, 1]}, {0: [1]}], "expert 1 of layer 0 is in experts-0 and experts-1;"),
        ([{0: [0, 1, 1]}], "expert 1 of layer 0 is in experts-0 twice;"),
        ([{0: [0]}], "expert 1 of layer 0 is in no group;"),
        ([{0: [0, 1]}, {}], "group experts-1 holds no expert;"),
        ([{0: [0, 1]}, {0: []}], "group experts-1 holds no expert;"),
        ([{0: [0, 1, 2]}], "names expert 2 of layer 0; allowed: 0 to 1"),
        ([{0: [0, 1, -1]}], "names expert -1 of layer 0; allowed: 0 to 1"),
        ([{0: [0, 1], 7: [0]}], "names layer 7; layers with experts: 0"),
    ],
)
def test_an_explicit_placement_that_is_no_partition_is_explained(groups, message):
    with pytest.raises(PlacementError, match=message):
        explicit({0: 2}, groups)


def test_a_group_may_hold_nothing_in_one_layer_and_different_experts_in_each():
    placement = explicit({0: 2, 1: 2}, [{0: [0, 1], 1: [1]}, {1: [0]}])
    assert placement.owner == {0: (0, 0), 1: (1, 0)}
    assert placement.as_json() == '[{"0":[0,1],"1":[1]},{"1":[0]}]'


@pytest.mark.parametrize("groups", [({0: (1, 0)},), ({0: (0, 1), 1: ()},)])
def test_a_placement_is_built_in_one_form_only(groups):
    with pytest.raises(PlacementError):
        Placement({0: 2, 1: 0}, groups)


@given(layers_and_groups())
def test_equal_placements_have_equal_text(case):
    layers, groups = case
    backwards = dict(reversed(layers.items()))
    assert contiguous(layers, groups).as_json() == contiguous(backwards, groups).as_json()


def test_a_load_file_is_summed_over_its_domains(tmp_path):
    text = json.dumps({"layers": [1, 3], "domains": {"code": [[1, 2], [3, 4]], "prose": [[0.5, 0], [0, 1e-05]]}})
    for name in ("load.json", "load.yaml"):
        (tmp_path / name).write_text(text)
        assert read_load(tmp_path / name) == {1: [1.5, 2.0], 3: [3.0, 4.00001]}


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "{}",
        '{"layers": [1], "domains": {"a": []}}',
        '{"layers": [1], "domains": {"a": [["x"]]}}',
        '{"layers": [1], "domains": {"a": [[1, 2]], "b": [[1]]}}',
        '{"layers": [1.5], "domains": {}}',
    ],
)
def test_a_load_file_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "load.json").write_text(text)
    with pytest.raises(PlacementError, match="must hold `layers` and `domains`"):
        read_load(tmp_path / "load.json")


def test_a_placement_file_is_yaml_or_json(tmp_path):
    (tmp_path / "p.yaml").write_text("groups:\n- {1: [0, 2]}\n- {1: [1]}\n")
    (tmp_path / "p.json").write_text('{"groups": [{"1": [0, 2]}, {"1": [1]}]}')
    assert read_groups(tmp_path / "p.yaml") == read_groups(tmp_path / "p.json") == [{1: [0, 2]}, {1: [1]}]


@pytest.mark.parametrize(
    "text", ["groups: 3", "groups: [{1: [true]}]", "groups: [{1.5: [1]}]", "groups: [[1]]", "[]", ""]
)
def test_a_placement_file_of_another_shape_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(PlacementError, match="must hold `groups`"):
        read_groups(tmp_path / "p.yaml")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\xfd", b"[" * 100_000])
@pytest.mark.parametrize("name", ["p.json", "p.yaml"])
def test_a_file_that_cannot_be_parsed_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PlacementError, match=f"{name} is not valid"):
        read_groups(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlacementError, match=r"nowhere\.yaml cannot be read: No such file"):
        read_groups(tmp_path / "nowhere.yaml")

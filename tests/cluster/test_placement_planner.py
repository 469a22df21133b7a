"""Plans: the best there is where brute force can tell, near a bound where not, never more moves than allowed.

About five seconds, most of it brute force.
"""

import statistics
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.placement import Placement, balanced, contiguous
from cluster.placement.allotments import fewest_groups
from cluster.placement.devices import DeviceKind
from cluster.placement.exact import is_small
from cluster.placement.free import free_plan
from cluster.placement.planner import plan
from cluster.placement.problem import bounds, global_bound, make_problem, slowest_of

LOAD = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 7.0]) | st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def kinds(draw, most_devices, most_slots, fewest_slots):
    """Kinds of devices that hold at least `fewest_slots` in all."""
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]
    left, found = most_devices, []
    for name in names:
        if left:
            count = draw(st.integers(1, left))
            speed = draw(st.sampled_from([0.3, 1.0, 1.0, 2.5]))
            found.append(DeviceKind(name, count, draw(st.integers(1, most_slots)), speed))
            left -= count
    missing = fewest_slots - sum(kind.count * kind.slots for kind in found)
    if missing > 0:
        first = found[0]
        found[0] = DeviceKind(first.name, first.count, first.slots + -(-missing // first.count), first.speed)
    return found


@st.composite
def instances(draw, layers, experts, devices):
    counts = draw(st.lists(st.integers(1, experts), min_size=1, max_size=layers))
    load = {3 * i: draw(st.lists(LOAD, min_size=n, max_size=n)) for i, n in enumerate(counts)}
    return load, draw(kinds(devices, experts, max(counts)))


@st.composite
def placements(draw, load, groups):
    """Any partition of the experts in `groups` groups, each with an expert somewhere."""
    pairs = [(layer, expert) for layer, row in load.items() for expert in range(len(row))]
    groups = min(groups, len(pairs))
    owner = [draw(st.integers(0, groups - 1)) for _ in pairs]
    for group, index in enumerate(draw(st.permutations(range(len(pairs))))[:groups]):
        owner[index] = group
    members = [{} for _ in range(groups)]
    for (layer, expert), group in zip(pairs, owner, strict=True):
        members[group].setdefault(layer, []).append(expert)
    return Placement(
        {layer: len(row) for layer, row in load.items()},
        tuple({layer: tuple(ids) for layer, ids in group.items()} for group in members),
    )


def brute_force(load, devices, groups=None, today=None, max_moves=0):
    """The least sum of slowest times, by every label of every device and every owner of every expert."""
    each = [(kind.slots, kind.speed) for kind in devices for _ in range(kind.count)]
    best = np.inf
    for labels in product(range(-1, len(each)), repeat=len(each)):
        count = max(labels) + 1
        first_seen = list(dict.fromkeys(label for label in labels if label >= 0))
        if count < 1 or sorted(first_seen) != list(range(count)) or groups not in (None, count):
            continue
        if today is None and first_seen != sorted(first_seen):
            continue  # the same with other names
        speed = [sum(s for (_, s), label in zip(each, labels, strict=True) if label == g) for g in range(count)]
        room = [min(n for (n, _), label in zip(each, labels, strict=True) if label == g) for g in range(count)]
        so_far = {(0, 0): 0.0}  # (groups that hold something, moves) -> least sum
        for layer, row in load.items():
            options = every_split(row, speed, room, None if today is None else today.owner[layer])
            after = {}
            for (held, moved), total in so_far.items():
                for (more, moves), cost in options.items():
                    key = (held | more, moved + moves)
                    if key[1] <= max_moves:
                        after[key] = min(after.get(key, np.inf), total + cost)
            so_far = after
        best = min([best, *(total for (held, _), total in so_far.items() if held == (1 << count) - 1)])
    return best


def every_split(row, speed, room, today):
    """(groups that hold something as bits, moves) -> the least time of the slowest group, over all owners."""
    owners = np.array(list(product(range(len(speed)), repeat=len(row))))
    held = np.stack([owners == group for group in range(len(speed))], axis=1)
    cost = ((held @ np.array(row)) / np.array(speed)).max(axis=1)
    fits = (held.sum(axis=2) <= np.array(room)).all(axis=1)
    bits = (held.any(axis=2) * (1 << np.arange(len(speed)))).sum(axis=1)
    moves = np.zeros(len(owners), int) if today is None else (owners != np.array(today)).sum(axis=1)
    least = {}
    for index in np.flatnonzero(fits):
        key = (int(bits[index]), int(moves[index]))
        least[key] = min(least.get(key, np.inf), float(cost[index]))
    return least


def assert_valid(found, load, devices):
    """A partition whose groups fit on their devices, with every device used once; and the time it claims."""
    assert found.placement.experts_per_layer == {layer: len(row) for layer, row in load.items()}
    by_name = {kind.name: kind for kind in devices}
    for kind in devices:
        assert sum(r.get(kind.name, 0) for r in found.replicas) + found.unused.get(kind.name, 0) == kind.count
    speed = []
    for group, replicas in zip(found.placement.groups, found.replicas, strict=True):
        assert replicas
        room = min(by_name[name].slots for name in replicas)
        assert all(len(ids) <= room for ids in group.values())
        speed.append(sum(by_name[name].speed * count for name, count in replicas.items()))
    slowest = sum(
        max(sum(row[e] for e in g.get(layer, ())) / s for g, s in zip(found.placement.groups, speed, strict=True))
        for layer, row in load.items()
    )
    assert found.slowest == pytest.approx(slowest)
    assert found.bound <= found.slowest * (1 + 1e-9) + 1e-12


def zipf(layers=58, experts=256, exponent=1.0, seed=0):
    """Each layer its own order of loads that fall as 1 / rank ** exponent, roughly; each adds up to 1."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.arange(1, experts + 1.0) ** -exponent * rng.lognormal(0, 0.2, experts))
        for _ in range(layers)
    ]
    return {layer: (row / row.sum()).tolist() for layer, row in enumerate(rows)}


@settings(deadline=None, max_examples=80)
@given(instances(layers=2, experts=5, devices=3))
def test_a_small_plan_is_as_good_as_brute_force(case):
    load, devices = case
    found = plan(load, devices)
    assert_valid(found, load, devices)
    assert found.exact
    assert found.slowest == pytest.approx(brute_force(load, devices))


@settings(deadline=None, max_examples=5)
@given(instances(layers=1, experts=8, devices=4))
def test_the_largest_small_plan_is_as_good_as_brute_force(case):
    load, devices = case
    assert plan(load, devices).slowest == pytest.approx(brute_force(load, devices))


@settings(deadline=None, max_examples=60)
@given(instances(layers=2, experts=4, devices=3), st.integers(1, 3))
def test_a_small_plan_of_given_groups_is_as_good_as_brute_force_and_leaves_none_empty(case, groups):
    load, devices = case
    try:
        found = plan(load, devices, groups=groups)
    except PlacementError:
        # More groups than a layer has experts are refused, though another layer could fill the others.
        assert groups > max(map(len, load.values())) or brute_force(load, devices, groups) == np.inf
        return
    assert_valid(found, load, devices)
    assert len(found.replicas) == groups
    assert found.slowest == pytest.approx(brute_force(load, devices, groups))


@settings(deadline=None, max_examples=60)
@given(instances(layers=2, experts=4, devices=3), st.integers(1, 3), st.integers(0, 8), st.data())
def test_a_small_plan_with_a_budget_of_moves_is_as_good_as_brute_force(case, groups, budget, data):
    load, devices = case
    today = data.draw(placements(load, groups))
    best = brute_force(load, devices, today=today, max_moves=budget)
    if best == np.inf:
        with pytest.raises(PlacementError, match=f"{budget} moves do not take .*; allowed: at least"):
            plan(load, devices, today=today, max_moves=budget)
        return
    found = plan(load, devices, today=today, max_moves=budget)
    assert_valid(found, load, devices)
    assert found.moves == moved(today, found.placement) <= budget
    assert found.slowest == pytest.approx(best)


def devices_in(devices):
    return sum(kind.count for kind in devices)


def moved(before, after):
    return sum(
        one != other for layer, row in before.owner.items() for one, other in zip(row, after.owner[layer], strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(instances(layers=3, experts=7, devices=4))
def test_what_large_plans_are_made_with_is_never_below_the_best_and_bounds_never_above(case):
    load, devices = case
    problem = make_problem(load, devices)
    best = plan(load, devices)
    assert best.exact
    allotment, owner, bound = free_plan(problem, None)
    reached = slowest_of(problem, allotment, owner)
    assert reached.sum() >= best.slowest * (1 - 1e-9)
    assert bound <= best.slowest * (1 + 1e-9) + 1e-12
    assert global_bound(problem).sum() <= best.slowest * (1 + 1e-9) + 1e-12
    assert (bounds(problem, allotment[None])[0] <= reached * (1 + 1e-9) + 1e-12).all()


@settings(deadline=None, max_examples=50)
@given(instances(layers=3, experts=24, devices=12), st.integers(1, 12))
def test_any_plan_uses_every_device_once_and_fits(case, groups):
    load, devices = case
    assert_valid(plan(load, devices), load, devices)
    if (
        not fewest_groups(make_problem(load, devices))
        <= groups
        <= min(devices_in(devices), max(map(len, load.values())))
    ):
        with pytest.raises(PlacementError, match=f"--groups: {groups} groups"):
            plan(load, devices, groups=groups)
        return
    found = plan(load, devices, groups=groups)
    assert_valid(found, load, devices)
    assert len(found.replicas) == groups


@settings(deadline=None, max_examples=40)
@given(instances(layers=3, experts=16, devices=8), st.integers(1, 8), st.integers(0, 30), st.data())
def test_no_plan_moves_more_than_its_budget(case, groups, budget, data):
    load, devices = case
    today = data.draw(placements(load, groups))
    try:
        found = plan(load, devices, today=today, max_moves=budget)
    except PlacementError:
        # It is only ever refused where today's placement cannot stay as it is.
        held = max(len(ids) for group in today.groups for ids in group.values())
        smallest = min(kind.slots for kind in devices)
        assert held > smallest or len(today.groups) > devices_in(devices)
        return
    assert_valid(found, load, devices)
    assert found.moves == moved(today, found.placement) <= budget


@settings(deadline=None, max_examples=30)
@given(instances(layers=3, experts=16, devices=8), st.integers(1, 8), st.data())
def test_with_any_number_of_moves_it_is_the_free_plan_under_other_names(case, groups, data):
    load, devices = case
    today = data.draw(placements(load, groups))
    free, found = plan(load, devices), plan(load, devices, today=today, max_moves=10**6)
    assert found.slowest == pytest.approx(free.slowest)
    for layer in load:
        sets = [{g.get(layer) for g in each.placement.groups} for each in (free, found)]
        assert sets[0] == sets[1]


def test_without_moves_only_the_devices_are_dealt_anew():
    load = zipf(layers=8, experts=64)
    today = contiguous(dict.fromkeys(load, 64), 8)
    devices = [DeviceKind("default", 12, 8)]
    found = plan(load, devices, today=today, max_moves=0)
    assert found.placement == today
    assert found.moves == 0
    assert sum(r["default"] for r in found.replicas) == 12
    one_each = sum(max(sum(load[layer][e] for e in g[layer]) for g in today.groups) for layer in load)
    assert found.slowest < one_each


def test_a_few_moves_go_a_long_way():
    load = zipf(layers=20, experts=64, exponent=0.7)
    today = contiguous(dict.fromkeys(load, 64), 8)
    devices = [DeviceKind("default", 8, 12)]
    costs = [plan(load, devices, groups=8, today=today, max_moves=moves).slowest for moves in (0, 40, 80, 160, 1280)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] - costs[2] > 0.6 * (costs[0] - costs[-1])


def test_lost_devices_move_only_what_they_held():
    load = zipf(layers=4, experts=32, exponent=0.3)
    today = balanced(dict.fromkeys(load, 32), 8, load)
    found = plan(load, [DeviceKind("default", 7, 6)], today=today, max_moves=24)
    assert len(found.replicas) == 7
    assert found.moves <= 24
    with pytest.raises(PlacementError, match="--max-moves: 3 moves do not take"):
        plan(load, [DeviceKind("default", 7, 6)], today=today, max_moves=3)


@pytest.mark.parametrize(("exponent", "ratio"), [(0.0, 1.01), (0.3, 1.01), (0.6, 1.03), (1.0, 1.08)])
def test_a_large_plan_is_near_its_bound(exponent, ratio):
    load, devices = zipf(exponent=exponent), [DeviceKind("default", 32, 9)]
    found = plan(load, devices)
    assert_valid(found, load, devices)
    assert found.ratio <= ratio


def test_a_large_plan_on_unequal_devices_is_near_its_bound():
    load = zipf(exponent=0.8)
    devices = [DeviceKind("l4", 24, 9), DeviceKind("h100", 8, 18, 3.0)]
    found = plan(load, devices)
    assert_valid(found, load, devices)
    assert found.ratio <= 1.05


def test_spare_devices_go_to_the_first_groups_and_these_are_hot_in_every_layer():
    load = zipf(exponent=1.0)
    found = plan(load, [DeviceKind("default", 32, 9)])
    replicas = [r["default"] for r in found.replicas]
    assert len(replicas) == 29
    assert replicas == sorted(replicas, reverse=True)
    assert replicas[0] > 1
    first = [row.index(max(row)) in found.placement.groups[0][layer] for layer, row in load.items()]
    assert sum(first) >= 0.9 * len(load)


def test_thirty_two_devices_are_planned_in_a_blink():
    load, devices = zipf(exponent=0.6), [DeviceKind("default", 32, 9)]
    plan(load, devices)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        plan(load, devices)
        took.append(time.perf_counter() - start)
    # 20 ms are the target, met on an idle machine; a busy one gets five times as long.
    assert statistics.median(took) < 0.1


def test_the_hottest_expert_alone_on_the_fast_device():
    found = plan({0: [30.0, 5.0, 5.0, 5.0]}, [DeviceKind("slow", 1, 3), DeviceKind("fast", 1, 3, 3.0)])
    assert found.slowest == pytest.approx(35 / 3)
    assert 0 in found.placement.groups[0][0]
    assert found.replicas == ({"fast": 1}, {"slow": 1})


def test_a_device_that_could_only_slow_a_step_down_is_left_out():
    devices = [DeviceKind("fast", 1, 2, 100.0), DeviceKind("slow", 1, 1, 0.01)]
    found = plan({0: [1.0, 1.0]}, devices)
    assert found.replicas == ({"fast": 1},)
    assert found.unused == {"slow": 1}


@pytest.mark.parametrize(
    ("load", "devices", "groups", "message"),
    [
        ({0: [1.0] * 9}, [DeviceKind("a", 2, 4)], None, "2 devices with 8 slots in all cannot hold the 9 experts"),
        ({0: [1.0] * 9}, [DeviceKind("a", 3, 4)], 2, "--groups: 2 groups .* allowed: 3 to 3"),
        ({0: [1.0] * 9}, [DeviceKind("a", 3, 9)], 4, "--groups: 4 groups .* allowed: 1 to 3"),
        ({0: [1.0, -1.0]}, [DeviceKind("a", 3, 9)], None, "finite loads of at least 0"),
        ({0: [1.0, float("inf")]}, [DeviceKind("a", 3, 9)], None, "finite loads of at least 0"),
        ({}, [DeviceKind("a", 3, 9)], None, "at least one layer"),
        ({0: []}, [DeviceKind("a", 3, 9)], None, "at least one layer, one expert"),
    ],
)
def test_what_cannot_be_planned_is_explained(load, devices, groups, message):
    with pytest.raises(PlacementError, match=message):
        plan(load, devices, groups=groups)


def test_a_placement_of_another_model_is_refused():
    with pytest.raises(PlacementError, match="of another model"):
        plan({0: [1.0] * 8}, [DeviceKind("a", 2, 8)], today=contiguous({0: 9}, 2), max_moves=1)


def test_layers_without_load_cost_nothing():
    load, devices = {0: [0.0] * 12, 1: [1.0] * 12}, [DeviceKind("a", 6, 4)]
    found = plan(load, devices)
    assert not is_small(make_problem(load, devices))
    assert_valid(found, load, devices)
    assert found.slowest == pytest.approx(2.0)

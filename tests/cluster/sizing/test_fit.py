"""No device gets more than it has, every expert a place; what does not fit is told with what would."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.sizing.config_text import placement_of
from cluster.sizing.fit import USUAL_SEQUENCES, Conditions, fit, times
from cluster.sizing.gpus import GpuPool
from cluster.sizing.memory import Work, router_memory, tokens_that_fit
from cluster.sizing.shape import read_shape
from tests.cluster.sizing.shapes import MODELS, fleets, made_up, shapes

SMALL = Conditions(work=Work(batch_tokens=8, sequences=4, kv_tokens=64))
TWO_KINDS = (GpuPool("rtx4070", 4, 12e9, 504e9), GpuPool("h100", 2, 80e9, 3350e9))


def check(shape, pools, plan, conditions):
    by_name = {pool.name: pool for pool in pools}
    assert plan.router.total_bytes <= conditions.usable(by_name[plan.router_pool])
    used = dict.fromkeys(by_name, 0)
    used[plan.router_pool] += conditions.work.routers
    for group in plan.groups:
        assert group.weights_bytes == shape.item_bytes * sum(
            len(ids) * shape.expert_numbers[layer] for layer, ids in group.experts.items()
        )
        for pool, count in group.replicas.items():
            assert group.weights_bytes + group.step_bytes <= conditions.usable(by_name[pool])
            used[pool] += count
    for name, pool in by_name.items():
        assert used[name] + plan.unused.get(name, 0) == pool.count
    placement_of(shape, plan)  # raises unless every expert is in one group


@given(shapes(), fleets(), st.integers(1, 2))
def test_a_plan_exceeds_no_device_and_places_every_expert_once(shape, pools, routers):
    conditions = replace(SMALL, work=replace(SMALL.work, routers=routers))
    try:
        plan = fit(shape, pools, conditions)
    except PlacementError:
        return  # what it says is tested below
    check(shape, pools, plan, conditions)


@given(st.integers(2600, 9000), fleets(most_gpus=1))
def test_what_is_said_to_fit_does_and_one_less_does_not(expert_numbers, pools):
    shape = made_up(dict.fromkeys(range(6), 12), expert_numbers=expert_numbers)
    for count, name in offers(shape, pools):
        grown, short = (
            [replace(pool, count=pool.count + more) if pool.name == name else pool for pool in pools]
            for more in (count, count - 1)
        )
        check(shape, grown, fit(shape, grown, SMALL), SMALL)
        if count > 1:
            assert offers(shape, short)


def offers(shape, pools):
    """(how many more, of which kind) a refusal offers."""
    with pytest.raises(PlacementError) as refused:
        fit(shape, pools, SMALL)
    return [(int(count), name) for count, name in re.findall(r"(\d+) more (\w+)", str(refused.value))]


def test_groups_are_as_uneven_as_the_devices():
    shape = read_shape(MODELS / "deepseek-v2-lite")
    plan = fit(shape, TWO_KINDS, Conditions())
    check(shape, TWO_KINDS, plan, Conditions())
    held = {pool: [] for pool in ("rtx4070", "h100")}
    for group in plan.groups:
        (pool,) = group.replicas
        held[pool].append(sum(map(len, group.experts.values())))
    assert min(held["h100"]) > 4 * max(held["rtx4070"])


def test_an_expert_that_fits_on_a_card_in_some_layers_only_is_no_waste():
    """An expert of Mixtral takes 11.3 GB in all layers together: more than a card of 12 GB gives."""
    shape = read_shape(MODELS / "mixtral-8x7b")
    pools = (GpuPool("rtx4070", 12, 12e9, 504e9), GpuPool("h100", 1, 80e9, 3350e9))
    plan = fit(shape, pools, Conditions())
    check(shape, pools, plan, Conditions())
    assert plan.router_pool == "h100"
    assert len(plan.groups) > 8


def test_a_device_more_is_used_only_where_the_step_gets_shorter():
    shape = made_up({0: 8, 1: 8}, expert_numbers=10**6)
    slow, fast = (GpuPool("one", 9, 1e9, bandwidth) for bandwidth in (1e9, 1e15))
    assert len(fit(shape, (slow,), Conditions()).groups) > 1
    assert len(fit(shape, (fast,), Conditions()).groups) == 1


def step_s(shape, pools, conditions):
    """Of the plan's usual step; None where it is unknown or nothing fits."""
    try:
        plan = fit(shape, pools, conditions)
    except PlacementError:
        return None
    return times(shape, pools, plan, conditions, [min(USUAL_SEQUENCES, conditions.work.sequences)])[0].total_s


@settings(deadline=None)
@given(shapes(), fleets(most_gpus=3), st.randoms(use_true_random=False))
def test_the_order_of_the_kinds_changes_nothing(shape, pools, random):
    typed = list(pools)
    random.shuffle(typed)
    assert step_s(shape, typed, SMALL) == step_s(shape, pools, SMALL)


@settings(deadline=None)
@given(shapes(), fleets(most_gpus=3), st.integers(0, 2))
def test_more_gpus_never_make_the_step_longer(shape, pools, grown):
    *fewer, new = pools
    before = step_s(shape, fewer, SMALL) if fewer else None
    after = step_s(shape, pools, SMALL)
    assert before is None or after <= before, new
    more = [replace(pool, count=pool.count + (index == grown)) for index, pool in enumerate(pools)]
    assert after is None or step_s(shape, more, SMALL) <= after


def test_slow_cards_with_room_do_not_displace_fast_ones():
    shape = read_shape(MODELS / "mixtral-8x7b")
    fast, slow = GpuPool("v100", 20, 16e9, 900e9), GpuPool("l4", 9, 24e9, 300e9)
    alone = step_s(shape, (fast,), Conditions())
    assert step_s(shape, (slow, fast), Conditions()) <= alone
    many = (replace(slow, count=90), replace(fast, count=90))  # not every choice of these is looked at
    assert step_s(shape, many, Conditions()) <= alone


def test_a_step_of_unknown_length_is_never_the_shortest():
    shape = read_shape(MODELS / "deepseek-v2-lite")
    unknown = GpuPool("mine", 4, 192e9, None)
    plan = fit(shape, (unknown, *TWO_KINDS), Conditions())
    assert times(shape, (unknown, *TWO_KINDS), plan, Conditions(), [8])[0].total_s is not None
    assert plan.unused["mine"] == 4


def test_without_a_bandwidth_no_time_is_made_up():
    shape = read_shape(MODELS / "deepseek-v2-lite")
    pools = (GpuPool("mine", 3, 80e9, None),)
    plan = fit(shape, pools, Conditions())
    (step,) = times(shape, pools, plan, Conditions(), [8])
    assert (step.router_s, step.experts_s, step.total_s, step.tokens_per_s) == (None,) * 4
    assert step.hops_s > 0


def test_a_router_that_fits_nowhere_is_told_with_what_is_missing():
    shape = read_shape(MODELS / "deepseek-v3")
    with pytest.raises(PlacementError) as caught:
        fit(shape, (GpuPool("l4", 100, 24e9, 300e9),), Conditions())
    said = str(caught.value)
    assert "a router needs 42.4 GB (34.2 GB of weights, 2.3 GB of keys and values, 5.9 GB for a step)" in said
    assert "l4 gives 21.6 GB: 20.8 GB are missing; what would fit: a GPU of 47.2 GB." in said


def test_fewer_tokens_are_offered_where_they_help():
    shape = read_shape(MODELS / "deepseek-v2-lite")
    large = Conditions(work=Work(kv_tokens=1 << 20))
    pools = (GpuPool("l4", 8, 24e9, 300e9),)
    with pytest.raises(PlacementError) as caught:
        fit(shape, pools, large)
    (tokens,) = re.findall(r"--kv-tokens (\d+)\.$", str(caught.value))
    fit(shape, pools, Conditions(work=Work(kv_tokens=int(tokens))))


@given(st.integers(60_000, 400_000), st.integers(0, 4000))
def test_the_tokens_for_which_there_is_room_fit(room, expanded):
    shape = replace(made_up({0: 4, 1: 4}), expanded_numbers=expanded)
    tokens = tokens_that_fit(shape, SMALL.work, room)
    assume(tokens)
    assert router_memory(shape, replace(SMALL.work, kv_tokens=tokens)).total_bytes <= room
    if tokens < shape.max_context:
        assert router_memory(shape, replace(SMALL.work, kv_tokens=tokens + 16)).total_bytes > room


def test_too_few_devices_for_the_routers_are_counted():
    shape = read_shape(MODELS / "deepseek-v2-lite")
    with pytest.raises(PlacementError, match=r"3 routers need a GPU each of .*, but there are only 2 h100"):
        fit(shape, TWO_KINDS[1:], Conditions(work=Work(routers=3)))


def test_recorded_loads_make_the_planner_deal():
    """Half of all rows go to one expert: its group gets the devices that are left over."""
    shape = made_up({0: 4, 1: 4}, expert_numbers=10_000)
    loads = {layer: [50.0, 10.0, 10.0, 10.0] for layer in shape.experts}
    pools = (GpuPool("one", 6, 250_000, 1e9),)
    plan = fit(shape, pools, SMALL, loads)
    check(shape, pools, plan, SMALL)
    hot = next(group for group in plan.groups if 0 in group.experts[0])
    assert sum(hot.replicas.values()) > 1


@settings(deadline=None)
@given(st.integers(100, 20_000), fleets(most_gpus=2))
def test_what_is_said_to_fit_with_loads_does(expert_numbers, pools):
    """The planner needs an expert of every layer on a device, so that there is room that it cannot use."""
    shape = made_up(dict.fromkeys(range(6), 12), expert_numbers=expert_numbers)
    loads = {layer: [1.0] * 12 for layer in shape.experts}
    try:
        fit(shape, pools, SMALL, loads)
    except PlacementError as refused:
        said = str(refused)
        assert not re.search(r"-\d", said), said
        for count, name in re.findall(r"(\d+) more (\w+)", said):
            grown = [replace(pool, count=pool.count + int(count) * (pool.name == name)) for pool in pools]
            check(shape, grown, fit(shape, grown, SMALL, loads), SMALL)


def test_room_for_less_than_an_expert_of_every_layer_does_not_count_with_loads():
    shape = made_up(dict.fromkeys(range(8), 4), expert_numbers=10_000)  # 40 kB each, 320 kB in all layers
    with pytest.raises(PlacementError, match="--loads needs GPUs that hold an expert of every layer") as refused:
        fit(shape, (GpuPool("one", 9, 250_000, 1e9),), SMALL, {layer: [1.0] * 4 for layer in shape.experts})
    assert not re.search(r"-\d", str(refused.value))


def test_loads_of_another_model_are_refused():
    with pytest.raises(PlacementError, match="--loads: these are of another model"):
        fit(made_up({0: 4}), (GpuPool("one", 3, 1e9, 1e9),), SMALL, {0: [1.0] * 5})

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoscale import needs
from autoscale.needs import Need, Rivals, Shares, Waits
from autoscale.signals import GroupLoad, RouterLoad

TARGET = 0.15
ALONE = Rivals()


def ratio(shares: Shares, rivals: Rivals = ALONE, *, target: float = TARGET, growing: bool = True) -> float:
    return needs.critical_ratio(shares, rivals, target, target, growing)


def test_the_worked_example_of_the_docstring() -> None:
    assert ratio(Shares(0.6, 0.4, 0.6)) == pytest.approx(1.96, abs=0.005)


def test_the_need_is_the_same_before_and_after_it_is_met() -> None:
    after = Shares(0.3 / 0.7, 0.1 / 0.7, 0.3 / 0.7)
    assert 2 * ratio(after, Rivals(0.2 / 0.7, 0.2 / 0.7)) == pytest.approx(ratio(Shares(0.6, 0.4, 0.6)))


waits = st.floats(0.001, 1.0)


@given(st.lists(waits, min_size=2, max_size=6), st.floats(0, 0.5), st.floats(0.05, 0.5))
def test_with_the_capacity_that_is_needed_the_wait_alone_is_just_the_target(
    compute_s: list[float], hop_s: float, target: float
) -> None:
    """In the model itself: a step of 1 s without experts, waits of a hop and a computation that capacity divides."""
    hot, others = compute_s[0] + hop_s, max(compute_s[1:]) + hop_s
    step_s = 1 + max(hot, others)
    shares = Shares(hot / step_s, max(0.0, hot - others) / step_s, compute_s[0] / step_s)
    assume(shares.alone > 1e-6)
    rivals = Rivals(others / step_s, others / step_s)
    capacity = ratio(shares, rivals, target=target)
    new = compute_s[0] / capacity + hop_s
    share = max(0.0, new - others) / (1 + max(new, others))
    if shares.alone > needs.allowed_alone(shares.alone, target):
        assert share == pytest.approx(target)
    else:
        assert capacity <= 1 + 1e-9
        assert share <= target + 1e-9


def test_no_capacity_is_asked_for_against_the_hop() -> None:
    assert ratio(Shares(0.8, 0.6, 0.0)) == 0.0
    assert ratio(Shares(0.8, 0.6, 0.05)) < 1
    # 0.3 of the step are hop: what stays of the computation need only be small beside that, not beside nothing.
    assert ratio(Shares(0.8, 0.6, 0.5)) == pytest.approx(0.5 / needs.allowed_alone(0.6, TARGET))


def test_two_groups_that_hide_each_other_are_seen_beside_the_typical_group() -> None:
    listed = Waits([0.4, 0.4, 0.05, 0.05], complete=True, critical=set())
    rivals = listed.rivals("experts-0", 0.4)
    assert (rivals.typical, rivals.hottest) == (0.05, 0.4)
    assert ratio(Shares(0.4, 0.0, 0.4), rivals) > 1.5


@pytest.mark.parametrize(
    ("complete", "critical", "joint"),
    [(True, set(), True), (True, {"experts-0"}, True), (True, {"experts-1"}, False), (False, set(), False)],
)
def test_hidden_groups_wait_for_the_one_that_is_critical_alone_and_for_what_is_not_known(
    complete: bool, critical: set[str], joint: bool
) -> None:
    rivals = Waits([0.4, 0.4, 0.05, 0.05], complete, critical).rivals("experts-0", 0.4)
    assert rivals.joint is joint
    assert (ratio(Shares(0.4, 0.0, 0.4), rivals) > 1) is joint


def test_a_balanced_load_makes_nobody_hot() -> None:
    rivals = Waits([0.5] * 8, complete=True, critical=set()).rivals("experts-0", 0.5)
    assert ratio(Shares(0.5, 0.0, 0.5), rivals) < 1


def test_a_group_that_a_much_slower_one_hides_needs_no_more() -> None:
    rivals = Waits([0.8, 0.5, 0.05, 0.05], complete=True, critical=set()).rivals("experts-1", 0.5)
    assert ratio(Shares(0.5, 0.0, 0.5), rivals) <= 1


@pytest.mark.parametrize(
    ("own", "typical", "hottest"), [(0.9, 0.5, 0.7), (0.7, 0.5, 0.9), (0.5, 0.7, 0.9), (0.1, 0.7, 0.9)]
)
def test_rivals_are_the_others(own: float, typical: float, hottest: float) -> None:
    rivals = Waits([0.9, 0.7, 0.5, 0.1], complete=True, critical=set()).rivals("experts-0", own)
    assert (rivals.typical, rivals.hottest) == (typical, hottest)


def test_a_single_group_has_no_rivals() -> None:
    assert Waits([0.9], complete=True, critical=set()).rivals("experts-0", 0.9) == Rivals()


shares = st.builds(
    lambda wait, alone, service: Shares(wait, wait * alone, wait * service),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
rivals = st.builds(
    lambda low, high, joint: Rivals(min(low, high), max(low, high), joint),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)
targets = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)


@given(shares, rivals, targets, st.booleans())
def test_the_ratio_is_a_number_whatever_the_shares(shares: Shares, rivals: Rivals, target: float, up: bool) -> None:
    found = ratio(shares, rivals, target=target, growing=up)
    assert math.isfinite(found)
    assert found >= 0


@given(shares, rivals, st.floats(0.01, 0.9), st.floats(0.5, 1))
def test_tightened_targets_never_need_less(shares: Shares, rivals: Rivals, target: float, slack: float) -> None:
    up = needs.critical_ratio(shares, rivals, target, target, growing=True)
    down = needs.critical_ratio(shares, rivals, target * slack, target * (2 - slack), growing=False)
    assert down >= min(up, 1) * (1 - 1e-9) or down >= up * (1 - 1e-9)


def load(**changes: float) -> GroupLoad:
    return GroupLoad(**({"offered_rows_per_s": 400.0} | changes))  # type: ignore[arg-type]


def test_demand_counts_what_comes_and_the_queue_only_of_saturated_replicas() -> None:
    assert needs.demand(load(), 1000, True, 10) == 400
    assert needs.demand(load(coming_rows_per_s=50.0), 1000, True, 10) == 450
    assert needs.demand(load(queue_rows=300.0, utilization=0.5), 1000, True, 10) == 400
    assert needs.demand(load(queue_rows=300.0, utilization=0.95), 1000, True, 10) == 430
    assert needs.demand(load(queue_rows=300.0, utilization=0.95), 1000, True, 0) == 700


def test_demand_is_in_busy_replicas_where_no_speed_is_known() -> None:
    assert needs.demand(load(utilization=0.5), 3, False, 10) == 1.5
    assert needs.demand(load(utilization=0.5, coming_rows_per_s=400.0), 3, False, 10) == 3
    assert needs.demand(load(offered_rows_per_s=0.0, utilization=0.5), 3, False, 10) == 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 1e300])
@pytest.mark.parametrize(
    "key", ["offered_rows_per_s", "coming_rows_per_s", "utilization", "queue_rows", "wait_share", "critical_share"]
)
def test_a_load_with_a_number_that_is_none_is_unusable(key: str, bad: float) -> None:
    assert needs.is_usable(load())
    assert not needs.is_usable(load(**{key: bad}))
    assert not needs.is_usable(GroupLoad(1.0, service_share=bad))
    assert not needs.is_usable(GroupLoad(1.0, speed_rows_per_s={"default": bad}))
    assert not needs.is_usable_router(RouterLoad(bad, 0.0))


def test_shares_are_made_consistent() -> None:
    assert needs.raw_shares(GroupLoad(1.0, 1.4, 0.5, None)) == Shares(1.0, 0.5, 1.0)
    assert needs.raw_shares(GroupLoad(1.0, 0.4, 0.5, 0.6)) == Shares(0.4, 0.4, 0.4)
    assert needs.raw_shares(GroupLoad(1.0)) is None


def test_gain_is_what_the_step_gets_shorter_and_no_more_than_the_wait_alone() -> None:
    need = Need(0, 0, shares=Shares(0.6, 0.2, 0.6), rivals=Rivals(0.4, 0.4))
    assert needs.gain(need, 1, 1, 1.2) == pytest.approx(0.1)
    assert needs.gain(need, 1, 1, 8) == pytest.approx(0.2)
    assert needs.gain(need, 2, 2, 1) == pytest.approx(-0.6)
    assert needs.gain(need, 0, 0, 1) == 0.0


@pytest.mark.parametrize(
    ("router", "up", "down"),
    [
        (RouterLoad(30, 4), 34 / 16, 34 / 16 / 0.8),
        (RouterLoad(3, 4, kv_used_share=0.95), 2, 2),
        (RouterLoad(3, 0, kv_used_share=0.95), 3 / 16, 3 / 16 / 0.8),
        (RouterLoad(0, 0), 0, 0),
    ],
)
def test_routers_are_needed_by_requests_and_by_a_full_cache_that_keeps_some_waiting(
    router: RouterLoad, up: float, down: float
) -> None:
    need = needs.router_need(router, router.running + router.waiting, 16, 0.8, 1)
    assert (need.up, need.down) == (pytest.approx(up), pytest.approx(down))

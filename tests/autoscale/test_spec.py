"""What a policy says for a group: defaults, rules, bounds of schedules. Well under a second."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autoscale.spec import (
    Bounds,
    Downscale,
    PolicySpec,
    RouterScaling,
    ScalingSpec,
    ScheduleEntry,
    Startup,
    Upscale,
)


def policy(**parts: Any) -> PolicySpec:
    return PolicySpec.model_validate({"version": 1, **parts})


def entry(**parts: Any) -> ScheduleEntry:
    return ScheduleEntry.model_validate({"cron": "0 8 * * *", "duration_s": 60, **parts})


def test_a_version_is_a_whole_policy_with_the_documented_defaults() -> None:
    spec = policy()
    assert spec.scaling("experts-0") == ScalingSpec(
        min_replicas=1,
        max_replicas=4,
        target_utilization=0.65,
        target_critical_share=0.15,
        hysteresis=0.15,
        upscale=Upscale(after_s=1, max_step=4),
        downscale=Downscale(after_s=60, max_step=1),
        startup=Startup(budget_s=120, backoff_s=120),
        pools=None,
    )
    assert spec.router == RouterScaling(min_replicas=1, max_replicas=4, target_ongoing_requests=16)
    assert (spec.forecast.method, spec.forecast.horizon_s) == ("holt", 15)


def test_a_rule_changes_only_what_it_writes_inside_its_parts_too() -> None:
    spec = policy(
        defaults={"max_replicas": 8, "pools": ["default"], "upscale": {"max_step": 3}, "startup": {"budget_s": 7}},
        groups=[{"match": "experts-*", "min_replicas": 6, "upscale": {"after_s": 0}, "pools": None}],
    )
    scaling = spec.scaling("experts-5")
    assert (scaling.min_replicas, scaling.max_replicas, scaling.pools) == (6, 8, None)
    assert scaling.upscale == Upscale(after_s=0, max_step=3)
    assert scaling.startup == Startup(budget_s=7, backoff_s=120)
    assert not hasattr(scaling, "match")


def test_a_written_default_counts_as_written() -> None:
    spec = policy(defaults={"max_replicas": 8}, groups=[{"match": "experts-0", "max_replicas": 4}])
    assert spec.scaling("experts-0").max_replicas == 4
    assert spec.scaling("experts-1").max_replicas == 8


def test_the_first_matching_rule_counts() -> None:
    rules = [{"match": "experts-1?", "max_replicas": 5}, {"match": "experts-*", "max_replicas": 6}]
    spec = policy(groups=rules)
    assert [spec.rule(group) for group in ("experts-1", "experts-12", "EXPERTS-12")] == [1, 0, None]
    assert [spec.scaling(group).max_replicas for group in ("experts-1", "experts-12", "EXPERTS-12")] == [6, 5, 4]


def test_what_holds_for_a_group_is_made_once() -> None:
    spec = policy(groups=[{"match": "experts-0", "max_replicas": 8}])
    assert spec.scaling("experts-0") is spec.scaling("experts-0")


def test_a_changed_copy_remembers_nothing_of_the_original() -> None:
    spec = policy()
    assert spec.scaling("experts-0").max_replicas == 4
    changed = spec.model_copy(update={"defaults": ScalingSpec(max_replicas=9)})
    assert changed.scaling("experts-0").max_replicas == 9
    assert spec.scaling("experts-0").max_replicas == 4


def test_what_is_remembered_is_no_part_of_the_policy() -> None:
    asked, other = policy(), policy()
    asked.scaling("experts-0")
    assert asked == other
    assert pickle.loads(pickle.dumps(asked)) == other
    assert asked.model_dump() == other.model_dump()


def test_entries_bound_the_groups_they_match_and_the_routers() -> None:
    spec = policy(groups=[{"match": "experts-0", "max_replicas": 8}])
    active = entry(
        groups={"experts-0": {"min_replicas": 2}, "experts-*": {"max_replicas": 3}}, router={"min_replicas": 2}
    )
    bounded = spec.under((active,))
    assert bounds(bounded.scaling("experts-0")) == (2, 8)  # the first pattern counts
    assert bounds(bounded.scaling("experts-1")) == (1, 3)
    assert bounds(bounded.scaling("Ingress")) == (1, 4)
    assert bounds(bounded.router) == (2, 4)
    assert (bounds(spec.scaling("experts-0")), bounds(spec.router)) == ((1, 8), (1, 4))
    assert bounded != spec
    assert (bounded.groups, bounded.defaults) == (spec.groups, spec.defaults)


def test_later_entries_win_and_leave_what_they_do_not_say() -> None:
    first = entry(groups={"*": {"min_replicas": 2, "max_replicas": 6}}, router={"max_replicas": 6})
    second = entry(groups={"experts-*": {"min_replicas": 3}}, router={"max_replicas": 7})
    spec = policy()
    assert bounds(spec.under((first, second)).scaling("experts-0")) == (3, 6)
    assert bounds(spec.under((second, first)).scaling("experts-0")) == (2, 6)
    assert spec.under((first, second)).router.max_replicas == 7


@pytest.mark.parametrize(
    ("given_bounds", "expected"),
    [
        (Bounds(), (2, 4)),
        (Bounds(min_replicas=6), (6, 6)),
        (Bounds(max_replicas=1), (1, 1)),
        (Bounds(min_replicas=5, max_replicas=7), (5, 7)),
        (Bounds(min_replicas=1), (1, 4)),
    ],
)
def test_a_bound_that_would_contradict_one_that_is_given_moves(given_bounds: Bounds, expected: tuple[int, int]) -> None:
    assert bounds(given_bounds.applied_to(ScalingSpec(min_replicas=2, max_replicas=4))) == expected
    assert bounds(given_bounds.applied_to(RouterScaling(min_replicas=2, max_replicas=4))) == expected


BOUND = st.none() | st.integers(1, 9)


@given(st.lists(st.tuples(BOUND, BOUND).filter(lambda pair: None in pair or pair[0] <= pair[1]), max_size=4))
def test_bounds_stay_in_order_and_the_last_entry_is_obeyed(pairs: list[tuple[int | None, int | None]]) -> None:
    entries = tuple(entry(groups={"*": {"min_replicas": least, "max_replicas": most}}) for least, most in pairs)
    scaling = policy(defaults={"min_replicas": 2, "max_replicas": 5}).under(entries).scaling("experts-0")
    assert 1 <= scaling.min_replicas <= scaling.max_replicas
    if pairs:
        least, most = pairs[-1]
        assert least in (None, scaling.min_replicas)
        assert most in (None, scaling.max_replicas)


def test_a_policy_made_in_code_is_held_to_the_same_rules() -> None:
    with pytest.raises(ValidationError, match="min_replicas: the value 5 is not allowed"):
        ScalingSpec(min_replicas=5)
    with pytest.raises(ValidationError, match="frozen"):
        policy().version = 1  # type: ignore[misc]


def bounds(scaling: ScalingSpec | RouterScaling) -> tuple[int, int]:
    return scaling.min_replicas, scaling.max_replicas

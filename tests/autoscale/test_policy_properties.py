"""What holds for `decide` whatever comes: it never raises, keeps to bounds and budget, and forgets what is gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale.policy import Decision, PolicyState, decide
from autoscale.signals import ROUTER, Fleet, GroupLoad, RouterLoad, Signals, UnitCounts, UnitFacts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import group_fleet

POOLS = ("default", "h100")
HARD = 6
FLEET = group_fleet(3, POOLS, routers=True, hard=HARD)
HOMES = {"experts-0", "experts-1", "experts-2", ROUTER}

anything = st.floats() | st.sampled_from([0.0, -1.0, 1e-308, 5e-324, 1e308, 1.0, 500.0])
share = st.none() | st.floats(0, 1) | anything
loads = st.builds(
    GroupLoad,
    offered_rows_per_s=st.floats(0, 1e5) | anything,
    wait_share=share,
    critical_share=share,
    service_share=share,
    coming_rows_per_s=st.just(0.0) | anything,
    speed_rows_per_s=st.dictionaries(st.sampled_from(POOLS), st.floats(1, 1e4) | anything),
    utilization=st.floats(0, 1) | anything,
    queue_rows=st.just(0.0) | anything,
)
routers = st.builds(RouterLoad, st.floats(0, 100) | anything, anything, anything, st.none() | anything, anything)
counts = st.builds(UnitCounts, st.integers(0, 8), st.integers(0, 8), st.integers(0, 3))
absurd_counts = st.builds(UnitCounts, st.integers(), st.integers(), st.integers())

tiny_to_huge = st.floats(5e-324, 1e9)
seconds = st.sampled_from([0.0, 5e-324, 1.0, 60.0, 86400.0]) | st.floats(0, 86400)
positive_seconds = st.sampled_from([5e-324, 1.0, 60.0, 86400.0]) | st.floats(0, 86400, exclude_min=True)
open_share = st.floats(0, 1, exclude_min=True, exclude_max=True)
hysteresis = st.floats(0, 1, exclude_max=True)
steps = st.integers(1, 10**6)


@st.composite
def scalings(draw: Any, *targets: tuple[str, Any]) -> dict[str, Any]:
    low = draw(st.integers(1, 6))
    return {
        "min_replicas": low,
        "max_replicas": draw(st.integers(low, 10) | st.just(10**6)),
        "hysteresis": draw(hysteresis),
        "upscale": {"after_s": draw(seconds), "max_step": draw(steps)},
        "downscale": {"after_s": draw(seconds), "max_step": draw(steps)},
        "startup": {"budget_s": draw(positive_seconds), "backoff_s": draw(positive_seconds)},
        **{key: draw(values) for key, values in targets},
    }


def amounts(top: int) -> Any:
    return st.none() | st.integers(0, top) | st.dictionaries(st.sampled_from(POOLS), st.integers(0, top))


@st.composite
def specs(draw: Any) -> PolicySpec:
    group = scalings(
        ("target_utilization", open_share),
        ("target_critical_share", open_share),
        ("pools", st.none() | st.lists(st.sampled_from(POOLS), min_size=1, unique=True)),
    )
    return PolicySpec.model_validate(
        {
            "version": 1,
            "defaults": draw(group),
            "groups": draw(st.just([]) | group.map(lambda rule: [{"match": "experts-1", **rule}])),
            "router": draw(scalings(("target_ongoing_requests", tiny_to_huge))),
            "budget": {key: draw(amounts(30)) for key in ("gpus", "cpus", "replicas")},
            "pools": draw(
                st.dictionaries(
                    st.sampled_from(POOLS),
                    st.fixed_dictionaries({"cost": tiny_to_huge, "max_replicas": st.none() | st.integers(0, 12)}),
                )
            ),
            "slo": {key: draw(st.none() | tiny_to_huge) for key in ("ttft_p95_ms", "tpot_p95_ms")},
            "forecast": {
                "method": draw(st.sampled_from(["holt", "none"])),
                "horizon_s": draw(seconds),
                "level_tau_s": draw(positive_seconds),
                "trend_tau_s": draw(positive_seconds),
            },
        }
    )


def signals(unit_counts: Any) -> Any:
    return st.builds(
        Signals,
        st.fixed_dictionaries(dict.fromkeys(FLEET.units, unit_counts))
        | st.dictionaries(st.sampled_from(list(FLEET.units)), unit_counts),
        st.dictionaries(st.sampled_from(FLEET.groups), st.none() | loads),
        st.none() | routers,
    )


times = st.floats() | st.integers(0, 10_000).map(float)
many = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@many
@given(specs(), st.lists(st.tuples(times, signals(counts | absurd_counts)), min_size=1, max_size=8))
def test_it_never_raises_and_keeps_to_what_serve_allows(spec: PolicySpec, moments: list[tuple[float, Signals]]) -> None:
    state = PolicyState()
    for now, moment in moments:
        decision = decide(moment, spec, FLEET, state, now)
        state = decision.state
        for unit, target in decision.targets.items():
            assert (1 if unit in HOMES else 0) <= target <= HARD
            assert unit in moment.counts
        assert_is_consistent(decision)
        assert state.now is not None
        assert math.isfinite(state.now)
        for remembered in (state.watched, state.starts, state.up_since, state.down_since):
            assert len(remembered) <= len(FLEET.units)


def assert_is_consistent(decision: Decision) -> None:
    for change in decision.changes:
        assert decision.targets[change.unit] == change.after != change.before
        assert change.reason.startswith(f"{change.unit}: ")
        assert change.reason.endswith(f", {change.before} -> {change.after}")


def held(spec: PolicySpec, all_counts: Mapping[str, UnitCounts], targets: Mapping[str, int]) -> dict[Any, float]:
    """Account -> what is held of it with these targets. Written down anew, from what the policy file promises."""
    sums: dict[Any, float] = {}
    for name, count in all_counts.items():
        facts = FLEET.units[name]
        replicas = max(count.ready, targets.get(name, count.target)) + count.leaving
        resources = {"gpus": facts.gpus, "cpus": facts.cpus, "replicas": 0.0 if facts.group is None else 1.0}
        for resource, amount in resources.items():
            for account in (resource, (resource, facts.pool)):
                sums[account] = sums.get(account, 0.0) + replicas * amount
    bounds: dict[Any, float] = {}
    for resource in ("gpus", "cpus", "replicas"):
        bound = getattr(spec.budget, resource)
        if isinstance(bound, dict):
            bounds |= {(resource, pool): amount for pool, amount in bound.items()}
        elif bound is not None:
            bounds[resource] = bound
    for pool, policy in spec.pools.items():
        if policy.max_replicas is not None:
            bounds[("replicas", pool)] = min(policy.max_replicas, bounds.get(("replicas", pool), math.inf))
    return {account: sums.get(account, 0.0) - bound for account, bound in bounds.items()}


@many
@given(specs(), st.lists(st.tuples(times, signals(counts)), min_size=1, max_size=8))
def test_it_never_holds_more_than_the_budget_or_grows_where_it_is_exceeded(
    spec: PolicySpec, moments: list[tuple[float, Signals]]
) -> None:
    state = PolicyState()
    for now, moment in moments:
        decision = decide(moment, spec, FLEET, state, now)
        state = decision.state
        before = held(spec, moment.counts, {})
        for account, excess in held(spec, moment.counts, decision.targets).items():
            assert excess <= max(0.0, before[account]) + 1e-6


@many
@given(specs(), st.lists(signals(counts), min_size=1, max_size=12), st.floats(0, 30))
def test_steps_are_no_larger_than_the_policy_says(spec: PolicySpec, moments: list[Signals], step_s: float) -> None:
    state = PolicyState()
    for tick, moment in enumerate(moments):
        decision = decide(moment, spec, FLEET, state, tick * step_s)
        state = decision.state
        grown: dict[str, int] = {}
        for change in decision.changes:
            name = change.group or change.unit
            grown[name] = grown.get(name, 0) + max(0, change.after - change.before)
        for name, step in grown.items():
            scaling = spec.router if name == ROUTER else spec.scaling(name)
            home_alone = 1 if moment.counts.get(name, UnitCounts(1, 1)).target < 1 else 0
            assert step <= scaling.upscale.max_step + home_alone


@many
@given(specs(), st.lists(signals(counts), min_size=1, max_size=6))
def test_the_same_input_gives_the_same_decision(spec: PolicySpec, moments: list[Signals]) -> None:
    def run(fleet: Fleet) -> list[Mapping[str, int]]:
        state, made = PolicyState(), []
        for tick, moment in enumerate(moments):
            decision = decide(moment, spec, fleet, state, float(tick))
            state = decision.state
            made.append(decision.targets)
        return made

    assert run(FLEET) == run(FLEET)


def test_what_left_the_fleet_is_forgotten() -> None:
    spec = PolicySpec(version=1)
    state = decide(
        Signals(dict.fromkeys(FLEET.units, UnitCounts(1, 2)), {}, None), spec, FLEET, PolicyState(), 0.0
    ).state
    assert len(state.starts) == len(FLEET.units)
    small = Fleet({"experts-0": UnitFacts("experts-0", "experts-0")}, HARD)
    state = decide(Signals({"experts-0": UnitCounts(1, 1)}, {}, None), spec, small, state, 1.0).state
    assert set(state.starts) == {"experts-0"}

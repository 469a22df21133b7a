"""What is decided, case by case. The properties that hold in any case: `test_policy_properties.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from autoscale.policy import Decision, PolicyState
from autoscale.signals import ROUTER, GroupLoad, RouterLoad, UnitCounts, UnitFacts
from autoscale.spec import PolicySpec
from tests.autoscale.fleets import SPEED, Ticks, at, group_fleet

A, B = "experts-0", "experts-1"
TICK_S = 0.25
"""A power of two, so that times add up exactly."""
STARTUP = {"startup": {"budget_s": 60, "backoff_s": 120}}
SLO = {"ttft_p95_ms": 800, "tpot_p95_ms": 80}


def load(rows: float = 10.0, **more: Any) -> GroupLoad:
    return GroupLoad(rows, **({"speed_rows_per_s": {"default": SPEED}} | more))


def critical(alone: float, wait: float = 0.6) -> GroupLoad:
    return load(wait_share=wait, critical_share=alone)


def ticks(count: int, units: tuple[str, ...] = ("default",), *, routers: bool = False, **spec: Any) -> Ticks:
    """Some groups, each in some pools, under a policy."""
    defaults = {"max_replicas": 8} | spec.pop("defaults", {})
    return Ticks(group_fleet(count, units, routers=routers), PolicySpec(version=1, defaults=defaults, **spec))


def held(
    run: Ticks,
    seconds: float,
    counts: Mapping[str, UnitCounts],
    loads: Mapping[str, GroupLoad | None],
    router: RouterLoad | None = None,
) -> Decision:
    """The last decision of a time in which nothing changes, not even what is decided."""
    decision = run.tick(counts, loads, router)
    for _ in range(round(seconds / TICK_S)):
        decision = run.tick(counts, loads, router, later_s=TICK_S)
    return decision


def changed(
    run: Ticks,
    seconds: float,
    counts: Mapping[str, UnitCounts],
    loads: Mapping[str, GroupLoad | None],
    router: RouterLoad | None = None,
) -> list[str]:
    """The reasons of all changes in that time, however often the same one is asked for."""
    made = [*run.tick(counts, loads, router).changes]
    for _ in range(round(seconds / TICK_S)):
        made += run.tick(counts, loads, router, later_s=TICK_S).changes
    return [change.reason for change in made]


def reasons(decision: Decision) -> list[str]:
    return [change.reason for change in decision.changes]


class TestGrowth:
    def test_by_utilisation_after_the_delay_and_with_a_reason(self) -> None:
        run = ticks(1)
        assert changed(run, 0.75, {A: at(2)}, {A: load(1900)}) == []
        decision = run.tick({A: at(2)}, {A: load(1900)}, later_s=TICK_S)
        assert decision.targets == {A: 3}
        assert reasons(decision) == [
            "experts-0: 1900 rows/s offered, 1300 rows/s capacity at 65 %, 2 -> 3",
        ]

    def test_by_the_critical_path(self) -> None:
        decision = held(ticks(2), 1.0, {A: at(1), B: at(1)}, {A: critical(0.4), B: critical(0, 0.2)})
        assert decision.targets == {A: 2, B: 1}
        assert reasons(decision) == [
            "experts-0: routers wait 40 % of their step time for it alone (target 15 %), 1 -> 2",
        ]

    def test_jumps_as_far_as_the_need_but_one_max_step_a_decision(self) -> None:
        run = ticks(1, defaults={"upscale": {"after_s": 0, "max_step": 3}})
        assert run.tick({A: at(1)}, {A: load(4000)}).targets == {A: 4}
        assert run.tick({A: at(1, 4)}, {A: load(4000)}, later_s=TICK_S).targets == {A: 7}

    def test_replicas_that_are_starting_are_not_asked_for_again(self) -> None:
        assert held(ticks(1), 5, {A: at(1, 3)}, {A: load(1900)}).targets == {A: 3}

    def test_a_saturated_closed_loop_can_double_and_double_again(self) -> None:
        counts, seen = 1, []
        for _ in range(3):
            full = load(SPEED * counts, utilization=1.0)
            counts = held(ticks(1), 1.0, {A: at(counts)}, {A: full}).targets[A]
            seen.append(counts)
        assert seen == [2, 4, 7]

    def test_the_backlog_of_a_saturated_group_makes_the_step_larger(self) -> None:
        full = load(SPEED, utilization=1.0, queue_rows=15_000.0)
        assert held(ticks(1), 1.0, {A: at(1)}, {A: full}).targets == {A: 4}

    def test_a_need_that_breaks_off_waits_anew(self) -> None:
        run = ticks(1)
        held(run, 0.75, {A: at(1)}, {A: load(1900)})
        run.tick({A: at(1)}, {A: None}, later_s=TICK_S)
        assert changed(run, 0.75, {A: at(1)}, {A: load(1900)}) == []

    def test_what_was_measured_with_fewer_replicas_is_not_read_as_of_todays(self) -> None:
        run = ticks(2, forecast={"level_tau_s": 60})
        cold = critical(0, 0.2)
        assert held(run, 1, {A: at(1), B: at(1)}, {A: critical(0.4), B: cold}).targets[A] == 2
        after = {A: load(wait_share=0.43, critical_share=0.14), B: critical(0, 0.29)}
        assert changed(run, 10, {A: at(2), B: at(1)}, after) == []

    def test_never_above_the_maximum_and_says_so(self) -> None:
        decision = held(ticks(1, defaults={"max_replicas": 2}), 2, {A: at(2)}, {A: load(1900)})
        assert decision.targets == {A: 2}
        assert decision.held_back == (
            "experts-0: 1900 rows/s offered, 1300 rows/s capacity at 65 %, 2 stay (max_replicas: 2)",
        )

    def test_a_rising_load_is_met_before_it_is_there(self) -> None:
        def first_growth(method: str) -> float:
            run = ticks(1, forecast={"method": method})
            for tick in range(600):
                if run.tick({A: at(1)}, {A: load(200 + tick)}, later_s=TICK_S).changes:
                    return 200 + tick
            raise AssertionError

        assert first_growth("holt") < 650 < first_growth("none")

    def test_without_any_known_speed_busy_time_decides(self) -> None:
        run = Ticks(group_fleet(1, speed=None), PolicySpec(version=1))
        decision = held(run, 1.0, {A: at(2)}, {A: GroupLoad(500.0, utilization=0.9)})
        assert decision.targets == {A: 3}
        assert "replicas are busy 90 % of the time (target 65 %)" in reasons(decision)[0]


class TestShrinking:
    def test_waits_for_the_delay_before_each_step(self) -> None:
        run = ticks(1)
        assert changed(run, 59.75, {A: at(3)}, {A: load(3)}) == []
        decision = run.tick({A: at(3)}, {A: load(3)}, later_s=TICK_S)
        assert reasons(decision) == ["experts-0: 3 rows/s offered fit 2 replicas for 60 s, 3 -> 2"]
        assert changed(run, 59.75, {A: at(2)}, {A: load(3)}) == []
        assert run.tick({A: at(2)}, {A: load(3)}, later_s=TICK_S).targets == {A: 1}

    @pytest.mark.parametrize(("rows", "stay"), [(560.0, 2), (540.0, 1)])
    def test_needs_room_below_the_target(self, rows: float, stay: int) -> None:
        """650 rows/s fit one replica at 65 %, but with 15 % hysteresis only 552 make a second one go."""
        assert held(ticks(1), 60, {A: at(2)}, {A: load(rows)}).targets == {A: stay}

    def test_an_idle_group_needs_its_minimum(self) -> None:
        decision = held(ticks(1, defaults={"min_replicas": 2}), 60, {A: at(3)}, {A: load(0.0)})
        assert decision.targets == {A: 2}
        assert changed(ticks(1, defaults={"min_replicas": 2}), 60, {A: at(2)}, {A: load(0.0)}) == []

    def test_not_where_the_wait_alone_would_be_too_long_again(self) -> None:
        loads = {A: load(wait_share=0.43, critical_share=0.14), B: load(wait_share=0.29, critical_share=0.0)}
        assert changed(ticks(2), 120, {A: at(2), B: at(1)}, loads) == []

    def test_at_most_max_step_at_once_and_never_the_last_one_at_home(self) -> None:
        run = ticks(1, defaults={"downscale": {"after_s": 0, "max_step": 5}})
        assert run.tick({A: at(4)}, {A: load(0.0)}).targets == {A: 1}


class TestMissingLoad:
    @pytest.mark.parametrize("bad", [None, load(float("nan")), load(-1.0), critical(float("inf"))])
    def test_means_no_decision(self, bad: GroupLoad | None) -> None:
        assert held(ticks(1), 100, {A: at(3)}, {A: bad}).targets == {}

    def test_of_one_group_leaves_the_others(self) -> None:
        assert held(ticks(2), 1, {A: at(1), B: at(1)}, {A: load(900), B: None}).targets == {A: 2}

    def test_does_not_keep_minimum_and_maximum_from_being_kept(self) -> None:
        run = ticks(2, defaults={"min_replicas": 2, "max_replicas": 3})
        decision = run.tick({A: at(1), B: at(5)}, {})
        assert decision.targets == {A: 2, B: 3}
        assert reasons(decision) == [
            "experts-0: at least 2 wanted, 1 -> 2",
            "experts-1: at most 3 allowed, 5 -> 3",
        ]


class TestBudget:
    def test_the_group_whose_replica_shortens_the_step_most_gets_it(self) -> None:
        run = ticks(3, budget={"replicas": 4})
        counts = {A: at(1), B: at(1), "experts-2": at(1)}
        decision = held(run, 1, counts, {A: load(900), B: critical(0.4), "experts-2": critical(0, 0.2)})
        assert decision.targets == {A: 1, B: 2, "experts-2": 1}
        assert decision.held_back == (
            "experts-0: 900 rows/s offered, 650 rows/s capacity at 65 %, 1 stay (budget: 4 replicas, all held)",
        )

    def test_a_minimum_comes_before_any_load(self) -> None:
        run = ticks(2, budget={"replicas": 3}, groups=[{"match": A, "min_replicas": 2}])
        assert held(run, 1, {A: at(1), B: at(1)}, {A: load(1), B: critical(0.5)}).targets == {A: 2, B: 1}

    def test_what_is_leaving_is_not_free(self) -> None:
        run = ticks(2, budget={"replicas": 3})
        assert changed(run, 5, {A: at(1), B: at(1, 1, 1)}, {A: load(900), B: load(1)}) == []

    def test_if_it_is_exceeded_the_least_useful_go_at_once_down_to_the_minima(self) -> None:
        run = ticks(2, budget={"replicas": 4})
        counts, loads = {A: at(3), B: at(3)}, {A: critical(0.5), B: load(1)}
        decision = run.tick(counts, loads)
        # One each, because a step down is one replica; the next decision goes on.
        assert reasons(decision) == [
            "experts-0: more is asked for than there is (budget: 4 replicas, all held), 3 -> 2",
            "experts-1: more is asked for than there is (budget: 4 replicas, all held), 3 -> 2",
        ]
        less = PolicySpec(version=1, budget={"replicas": 5})  # type: ignore[arg-type]
        assert Ticks(run.fleet, less).tick(counts, loads).targets == {A: 3, B: 2}
        run.spec = PolicySpec(version=1, budget={"replicas": 1})  # type: ignore[arg-type]
        assert run.tick({A: at(1), B: at(1)}, loads).targets == {A: 1, B: 1}

    def test_a_replica_nobody_needs_goes_at_once_to_a_starved_group(self) -> None:
        run = ticks(2, budget={"replicas": 4})
        loads = {A: load(1900), B: load(3)}
        decision = held(run, 1, {A: at(2), B: at(2)}, loads)
        assert reasons(decision) == ["experts-1: 3 rows/s offered fit 1 replica, and experts-0 needs the room, 2 -> 1"]
        assert changed(run, 10, {A: at(2), B: at(1, 1, 1)}, loads) == []
        assert reasons(run.tick({A: at(2), B: at(1)}, loads, later_s=TICK_S))[0].endswith("2 -> 3")

    def test_what_is_leaving_already_will_do_and_no_other_is_taken(self) -> None:
        run = ticks(3, budget={"replicas": 6})
        counts = {A: at(2), B: at(1, 1, 1), "experts-2": at(2)}
        assert changed(run, 10, counts, {A: load(1900), B: load(3), "experts-2": load(3)}) == []

    def test_a_replica_that_is_needed_is_not_taken(self) -> None:
        decision = held(ticks(2, budget={"replicas": 4}), 30, {A: at(2), B: at(2)}, {A: load(1900), B: load(600)})
        assert decision.changes == ()
        assert len(decision.held_back) == 1

    def test_preemption_waits_between_two(self) -> None:
        run = ticks(3, budget={"replicas": 7}, defaults={"upscale": {"after_s": 2}})
        loads = {A: load(5000), B: load(3), "experts-2": load(3)}
        taken = 0
        counts = {A: at(3), B: at(2), "experts-2": at(2)}
        for _ in range(round(5.5 / TICK_S)):  # what is taken is gone at once, and somebody else's at once
            taken += len(run.tick(counts, loads, later_s=TICK_S).changes)
        assert taken == 2

    def test_replicas_whose_number_is_fixed_hold_their_part(self) -> None:
        run = ticks(1, budget={"gpus": 4})
        assert held(run, 1, {A: at(1)}, {A: load(3900)}).targets == {A: 4}
        run = ticks(1, budget={"gpus": 4})
        run.fleet = replace(run.fleet, fixed=((UnitFacts(ROUTER, None, gpus=1.0), 2),))
        decision = held(run, 1, {A: at(1)}, {A: load(3900)})
        assert decision.targets == {A: 2}
        assert "budget: 4 gpus, all held" in decision.held_back[0]

    def test_routers_come_before_groups(self) -> None:
        run = ticks(1, routers=True, budget={"cpus": 2})
        decision = held(run, 1, {A: at(1), ROUTER: at(1)}, {A: load(900)}, RouterLoad(30, 2))
        assert decision.targets == {A: 2, ROUTER: 2}


class TestFailedGrowth:
    def test_is_given_up_after_its_time_and_not_tried_again_before_the_back_off(self) -> None:
        run = ticks(1, defaults=STARTUP)
        counts, loads = {A: at(1, 3)}, {A: load(1900)}
        assert changed(run, 60, counts, loads) == []
        decision = run.tick(counts, loads, later_s=TICK_S)
        assert reasons(decision) == [
            "experts-0: 2 replicas were not ready after 60 s and are given up; no new one for 120 s, 3 -> 1"
        ]
        waiting = held(run, 119, {A: at(1)}, loads)
        assert waiting.targets == {A: 1}
        assert "the back-off has not passed" in waiting.held_back[0]
        assert held(run, 1, {A: at(1)}, loads).targets == {A: 3}

    def test_again_waits_twice_as_long_and_a_success_forgets(self) -> None:
        run = ticks(1, defaults=STARTUP)
        loads = {A: load(1200)}

        def failure() -> str:
            held(run, 60, {A: at(1, 2)}, loads)
            return reasons(run.tick({A: at(1, 2)}, loads, later_s=TICK_S))[0]

        assert "no new one for 120 s" in failure()
        held(run, 121, {A: at(1)}, loads)
        assert "a replica was not ready after 60 s and is given up; no new one for 240 s" in failure()
        held(run, 241, {A: at(1)}, loads)
        run.tick({A: at(2)}, loads)
        run.tick({A: at(1, 1)}, loads)
        assert "no new one for 120 s" in failure()

    def test_another_pool_grows_instead(self) -> None:
        run = ticks(1, ("default", "ghost"), defaults=STARTUP, pools={"ghost": {"cost": 0.1}})
        loads = {A: load(900, speed_rows_per_s={"default": SPEED})}
        assert held(run, 1, {A: at(1), "experts-0-ghost": at(0)}, loads).targets == {A: 1, "experts-0-ghost": 1}
        late = {A: at(1), "experts-0-ghost": at(0, 1)}
        held(run, 60, late, loads)
        assert run.tick(late, loads, later_s=TICK_S).targets == {A: 1, "experts-0-ghost": 0}
        assert held(run, 1, {A: at(1), "experts-0-ghost": at(0)}, loads).targets == {A: 2, "experts-0-ghost": 0}

    def test_is_given_up_although_the_load_rises_and_more_is_asked_for_all_the_while(self) -> None:
        run = ticks(1, defaults={**STARTUP, "max_replicas": 8, "upscale": {"after_s": 0, "max_step": 1}})
        target, asked = 1, []
        for second in range(90):
            decision = run.tick({A: at(1, target)}, {A: load(700.0 + 40 * second)}, later_s=1)
            asked += [change.after for change in decision.changes]
            target = decision.targets.get(A, target)
        rising = asked[: asked.index(1)]
        assert rising == sorted(rising)
        assert len(rising) > 2, "it was asked for more several times before it was given up"
        assert target == 1

    def test_an_old_replica_that_comes_back_does_not_end_the_back_off(self) -> None:
        run = ticks(1, defaults=STARTUP)
        loads = {A: load(1900)}
        held(run, 60, {A: at(2, 3)}, loads)
        assert run.tick({A: at(2, 3)}, loads, later_s=TICK_S).targets == {A: 2}
        held(run, 2, {A: at(1, 2)}, loads)
        assert held(run, 20, {A: at(2)}, loads).targets == {A: 2}
        assert held(run, 100, {A: at(2)}, loads).targets == {A: 3}

    def test_needs_no_load(self) -> None:
        run = ticks(1, defaults=STARTUP)
        held(run, 60, {A: at(1, 2)}, {})
        assert run.tick({A: at(1, 2)}, {}, later_s=TICK_S).targets == {A: 1}

    def test_a_lost_replica_starts_the_time_anew_and_the_last_one_is_kept(self) -> None:
        run = ticks(1, defaults=STARTUP)
        held(run, 50, {A: at(2, 3)}, {})
        assert changed(run, 50, {A: at(1, 3)}, {}) == []
        assert changed(ticks(1, defaults=STARTUP), 200, {A: at(0, 1)}, {}) == []


class TestRouters:
    def test_grow_and_shrink_by_requests(self) -> None:
        run = ticks(1, routers=True)
        grown = held(run, 1, {ROUTER: at(2)}, {}, RouterLoad(30, 10))
        assert reasons(grown) == ["Router: 40 requests run or wait, a router should have 16, 2 -> 3"]
        shrunk = held(ticks(1, routers=True), 60, {ROUTER: at(2)}, {}, RouterLoad(5, 0))
        assert reasons(shrunk) == ["Router: 5 requests fit 1 replica for 60 s, 2 -> 1"]

    def test_without_load_stay(self) -> None:
        assert held(ticks(1, routers=True), 100, {ROUTER: at(2)}, {}, None).targets == {}


class TestSlo:
    def test_slow_tokens_give_the_group_that_saves_most_one_replica(self) -> None:
        run = ticks(2, slo=SLO)
        loads = {A: critical(0.12), B: critical(0, 0.48)}
        decision = run.tick({A: at(1), B: at(1)}, loads, RouterLoad(3, 0, tpot_p95_ms=95))
        assert reasons(decision) == [
            "experts-0: a token takes 95 ms (promised: 80 ms), one replica more saves 12 % of the step time, 1 -> 2"
        ]

    def test_one_step_per_horizon(self) -> None:
        run = ticks(2, slo=SLO)
        loads, slow = {A: critical(0.12), B: critical(0, 0.48)}, RouterLoad(3, 0, tpot_p95_ms=95)
        assert run.tick({A: at(1), B: at(1)}, loads, slow).changes
        assert changed(run, 14.75, {A: at(1), B: at(1)}, loads, slow) == []
        assert run.tick({A: at(1), B: at(1)}, loads, slow, later_s=TICK_S).changes

    def test_not_where_it_would_help_too_little(self) -> None:
        run = ticks(2, slo=SLO)
        loads = {A: critical(0.04), B: critical(0, 0.56)}
        assert run.tick({A: at(1), B: at(1)}, loads, RouterLoad(3, 0, tpot_p95_ms=95)).changes == ()

    def test_slow_first_tokens_with_full_routers_give_a_router(self) -> None:
        run = ticks(1, routers=True, slo=SLO)
        decision = run.tick({A: at(1), ROUTER: at(1)}, {A: critical(0.12)}, RouterLoad(14, 4, ttft_p95_ms=1900))
        assert decision.targets == {A: 1, ROUTER: 2}

    def test_slow_first_tokens_with_room_in_routers_give_a_group(self) -> None:
        run = ticks(2, routers=True, slo=SLO)
        counts, loads = {A: at(1), B: at(1), ROUTER: at(1)}, {A: critical(0.12), B: critical(0, 0.48)}
        assert run.tick(counts, loads, RouterLoad(4, 1, ttft_p95_ms=1900)).targets == {A: 2, B: 1, ROUTER: 1}
        fresh = ticks(2, routers=True, slo=SLO)
        assert fresh.tick(counts, loads, RouterLoad(4, 0, ttft_p95_ms=1900)).changes == ()

    def test_nothing_shrinks_while_it_is_violated(self) -> None:
        run = ticks(1, slo=SLO)
        assert changed(run, 100, {A: at(3)}, {A: load(3)}, RouterLoad(3, 0, ttft_p95_ms=900)) == []
        assert run.tick({A: at(3)}, {A: load(3)}, RouterLoad(3, 0, ttft_p95_ms=700)).targets == {A: 2}

    def test_nothing_shrinks_that_would_break_it_again(self) -> None:
        run = ticks(2, slo=SLO, defaults={"target_critical_share": 0.5})
        counts = {A: at(2), B: at(1)}
        loads = {A: critical(0.1, 0.5), B: critical(0, 0.4)}
        assert changed(run, 100, counts, loads, RouterLoad(3, 0, tpot_p95_ms=60)) == []
        assert held(ticks(2, slo=SLO, defaults={"target_critical_share": 0.5}), 60, counts, loads).targets[A] == 1

    def test_percentiles_that_are_no_numbers_promise_nothing(self) -> None:
        run = ticks(1, slo=SLO)
        nan = float("nan")
        decision = held(run, 60, {A: at(3)}, {A: load(3)}, RouterLoad(3, 0, ttft_p95_ms=nan, tpot_p95_ms=float("inf")))
        assert decision.targets == {A: 2}


class TestClock:
    def test_a_jump_back_starts_the_delays_anew_and_blocks_nothing(self) -> None:
        run = ticks(1)
        held(run, 0.75, {A: at(1)}, {A: load(1900)})
        run.now -= 1e6
        assert changed(run, 0.75, {A: at(1)}, {A: load(1900)}) == []
        assert run.tick({A: at(1)}, {A: load(1900)}, later_s=TICK_S).changes

    def test_what_is_left_of_a_back_off_survives_a_jump_back(self) -> None:
        run = ticks(1, defaults=STARTUP)
        held(run, 60.25, {A: at(1, 2)}, {A: load(900)})
        run.now -= 1e9
        assert changed(run, 119.75, {A: at(1)}, {A: load(900)}) == []
        assert run.tick({A: at(1)}, {A: load(900)}, later_s=TICK_S).targets == {A: 2}

    @pytest.mark.parametrize("absurd", [float("nan"), float("inf"), float("-inf")])
    def test_a_time_that_is_no_number_is_no_time(self, absurd: float) -> None:
        run = ticks(1)
        run.tick({A: at(1)}, {A: load(1900)})
        now, run.now = run.now, absurd
        assert run.tick({A: at(1)}, {A: load(1900)}).changes == ()
        run.now = now
        assert held(run, 1.0, {A: at(1)}, {A: load(1900)}).changes

    def test_an_empty_state_starts_with_the_delays(self) -> None:
        run = ticks(1)
        held(run, 0.75, {A: at(1)}, {A: load(1900)})
        run.state = PolicyState()
        assert changed(run, 0.75, {A: at(1)}, {A: load(1900)}) == []

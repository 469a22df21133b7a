"""Whole runs: conserved, repeatable, and answering to replicas the way a cluster does."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale.signals import ROUTER
from autoscale.simulation.run import Limit, Replay, waits
from autoscale.simulation.scalers import OngoingRequests, ServeFormula, Static
from autoscale.simulation.search import replay_policy, static_counts
from autoscale.spec import PolicySpec
from tests.autoscale.simulation.worlds import fixed, steady, world


def test_every_request_ends_once_and_every_token_is_computed():
    one = world(steady(4, 120))
    replay, result = fixed(one, 2, 2)
    assert result.done == result.requests == len(one.trace)
    assert replay.requests.served_tokens == pytest.approx(one.trace.prompt_tokens.sum())
    assert np.all(result.ttft_s >= result.queue_s)
    assert np.isfinite(result.tpot_s).all()


def test_littles_law_holds_for_a_run():
    one = world(steady(6, 300))
    replay, result = fixed(one, 2, 2)
    inside = np.array(replay.requests.finish_s() - one.trace.arrival_s).sum()
    sums = replay.measures._sums[replay.measures._now % replay.measures._size]
    assert sums[-1] * one.scenario.tick_s == pytest.approx(inside, rel=0.2)
    assert result.kept == 1


def test_devices_are_paid_for_the_whole_run_and_for_all_kinds_alike():
    one = world(steady(1, 60))
    _, split = fixed(one, 3, 2)
    whole = Replay(one, one.layout("whole"), [one.whole_unit()], [3], Static()).run("whole", {})
    assert whole is not None
    hours = one.ticks * one.scenario.tick_s / 3600
    assert split.device_hours == pytest.approx((4 * 3 + 2) * hours)
    assert whole.device_hours == pytest.approx(3 * 4 * hours)


def test_a_whole_model_without_company_computes_like_experts_without_a_hop():
    one = world(steady(0.2, 100))
    one.constants.update(hop_s=0.0, token_s=0.0)
    _, split = fixed(one, 1, 1)
    whole = Replay(one, one.layout("whole"), [one.whole_unit()], [1], Static()).run("whole", {})
    assert whole is not None
    assert whole.ttft_s == pytest.approx(split.ttft_s)


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    trace = steady(6, 60)
    runs = [fixed(world(trace, seed, mtbf_hours=0.05), 2, 2)[1] for seed in (1, 1, 2)]
    assert runs[0].ttft_s.tolist() == runs[1].ttft_s.tolist()
    assert runs[0].deaths == runs[1].deaths > 0
    assert runs[0].ttft_s.tolist() != runs[2].ttft_s.tolist()


def test_more_replicas_keep_more_requests():
    one = world(steady(14, 120))
    kept = [fixed(one, experts, 4)[1].kept for experts in (1, 2, 4, 8)]
    assert kept == sorted(kept)
    assert kept[0] < 0.5 < 0.95 < kept[-1]


def test_a_hopeless_run_is_given_up():
    one = world(steady(14, 300))
    units = one.split_units()
    replay = Replay(one, one.layout("split"), units, [1] * len(units), Static())
    assert replay.run("", {}, Limit(cost=1e9, kept=0.99)) is None
    replay = Replay(one, one.layout("split"), units, [1] * len(units), Static())
    assert replay.run("", {}, Limit(cost=0.1, kept=0.0)) is None


def test_engines_wait_alone_for_the_slowest_group_only():
    # One phase, two layers of different patterns: group 0 is slowest in one, group 2 in the other.
    wait_s = np.array([[[5.0, 2.0, 1.0], [1.0, 2.0, 4.0]]])
    waited, alone = waits(wait_s, np.array([10.0]), 1.0)
    assert waited.tolist() == [80, 60, 70]
    assert alone.tolist() == [30, 0, 20]


def test_static_counts_follow_the_load_of_each_group():
    one = world(steady(10, 300))
    peak, mean = (static_counts(one, 60, 0.7, peak) for peak in (True, False))
    assert all(of_peak >= of_mean >= 1 for of_peak, of_mean in zip(peak, mean, strict=True))
    assert static_counts(one, 60, 0.35, True)[0] >= 2 * peak[0] - 1


def test_the_policy_gives_replicas_to_the_groups_of_the_busy_domain_and_takes_them_back():
    trace = steady(10, 240)
    one = world(trace, drift={"period_s": 3600, "focus": 20})
    one.domain[:] = 0
    spec = PolicySpec.model_validate(
        {"version": 1, "defaults": {"max_replicas": 16, "downscale": {"after_s": 10, "max_step": 4}}}
    )
    result = replay_policy(one, spec, "policy", {})
    assert result is not None
    busiest = f"experts-{one.shares(one.scenario.model.placement)[0].mean(axis=0).argmax()}"
    idle = f"experts-{one.shares(one.scenario.model.placement)[0].mean(axis=0).argmin()}"
    assert result.counts[busiest].max() >= 3
    assert result.counts[idle].max() == 1
    assert result.counts[busiest][-1] < result.counts[busiest].max()
    assert any(busiest in reason for reason in result.reasons)


def test_the_policy_uses_the_second_pool_and_lives_through_failures():
    one = world(
        steady(12, 200), pools={"default": {"rows_per_s": 20000}, "fast": {"rows_per_s": 40000}}, mtbf_hours=0.05
    )
    spec = PolicySpec.model_validate({"version": 1, "defaults": {"max_replicas": 16}})
    result = replay_policy(one, spec, "policy", {})
    assert result is not None
    assert result.deaths > 0
    assert max(counts.max() for name, counts in result.counts.items() if name.endswith("-fast")) > 0
    assert result.done == result.requests


def test_serves_formula_follows_the_requests_in_the_system():
    one = world(steady(12, 200))
    rule = OngoingRequests(4, 1, 16, upscale_delay_s=0, downscale_delay_s=20, look_back_period_s=5)
    replay = Replay(one, one.layout("whole"), [one.whole_unit()], [1], ServeFormula({0: rule}))
    result = replay.run("whole", {})
    assert result is not None
    counts = result.counts["whole-model"]
    assert counts.max() > 2
    assert counts[-1] < counts.max()
    assert ROUTER not in result.counts

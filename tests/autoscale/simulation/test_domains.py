"""Domains: who uses which groups, and how the mixture moves."""

from __future__ import annotations

import numpy as np
import pytest

from autoscale.simulation.domains import DRIFT_STEP_S, domains_of, expert_loads, group_shares, imbalance, mixture
from autoscale.simulation.scenario import Drift, ModelShape, ZipfLoads


def model(exponent: float = 0.8) -> ModelShape:
    return ModelShape(
        layers=4, top_k=2, experts=64, groups=8, loads=ZipfLoads(domains=4, exponent=exponent, patterns=2)
    )


def test_an_exponent_of_0_is_even_and_a_larger_one_more_skewed():
    skews = [imbalance(group_shares(expert_loads(model(e), 0), 8, "contiguous")) for e in (0.0, 0.5, 1.0)]
    assert skews[0] == pytest.approx(1)
    assert skews == sorted(skews)
    assert skews[2] > 1.5


def test_balanced_evens_a_domain_out_and_by_domain_gathers_it():
    loads = expert_loads(model(), 0)
    gathered, even = (imbalance(group_shares(loads, 8, name)) for name in ("by_domain", "balanced"))
    assert gathered > 1.5 * even


def test_the_mixture_turns_once_in_a_period_and_without_focus_stays_even():
    turning = mixture(4, Drift(period_s=600, focus=4), 1800, 0)
    assert turning.sum(axis=1) == pytest.approx(1)
    assert set(turning.argmax(axis=1)) == {0, 1, 2, 3}
    assert np.abs(np.diff(turning, axis=0)).max() < 0.1
    assert mixture(4, Drift(focus=0), 600, 0) == pytest.approx(0.25)


def test_requests_are_drawn_from_the_mixture_of_their_moment():
    mix = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    arrival = np.repeat(np.arange(3) * DRIFT_STEP_S, 4000)
    domain = domains_of(arrival, mix, 0).reshape(3, 4000)
    assert domain[0].max() == 0
    assert domain[1].min() == 1
    assert domain[2].mean() == pytest.approx(0.5, abs=0.03)

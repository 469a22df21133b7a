"""Serve's formula: counts wanted, and how long they must have been wanted. Checked against Serve's own functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from autoscale.simulation.machines import Lives, Machines, Unit
from autoscale.simulation.measures import Measures
from autoscale.simulation.scalers import OngoingRequests, ServeFormula


class Known(Measures):
    """Measures of which the test says what is ongoing."""

    def __init__(self) -> None:
        super().__init__(1, 0.5, 0.5, 1.0, 0.5)
        self.requests = 0.0

    def ongoing(self, window_s: float):  # noqa: ARG002
        return self.requests, np.array([self.requests])


def machines() -> Machines:
    return Machines([Unit("m", None, "default", 1, 1.0)], Lives(0.0, 0.0, 0.0, None), [2], 0)


def rule(up_s: float = 0, down_s: float = 0) -> OngoingRequests:
    return OngoingRequests(4, 1, 10, up_s, down_s, 5)


@pytest.mark.parametrize(("ongoing", "wanted"), [(0, 1), (4, 1), (4.1, 2), (17, 5), (400, 10)])
def test_replicas_are_requests_over_target_within_bounds(ongoing: float, wanted: int):
    known, held = Known(), machines()
    known.requests = ongoing
    found = ServeFormula({0: rule()}).targets(known, held, 0.0)
    assert found.get(0, 2) == wanted


def test_a_wish_that_pauses_begins_its_delay_anew():
    known, held, formula = Known(), machines(), ServeFormula({0: rule(up_s=3)})
    found = []
    for now, ongoing in enumerate([40, 40, 8, 40, 40, 40, 40]):
        known.requests = ongoing
        found.append(formula.targets(known, held, float(now)))
    assert found == [{}] * 6 + [{0: 10}]


@settings(deadline=None)
@given(ongoing=st.lists(st.integers(0, 60), min_size=1, max_size=30), up_s=st.integers(0, 4), down_s=st.integers(0, 6))
def test_the_delays_are_serves_own(ongoing: list[int], up_s: int, down_s: int):
    config = AutoscalingConfig(min_replicas=1, max_replicas=10, upscale_delay_s=up_s, downscale_delay_s=down_s)
    known, held, formula = Known(), machines(), ServeFormula({0: rule(up_s, down_s)})
    state: dict[str, object] = {}
    target = 2
    for now, requests in enumerate(ongoing):
        known.requests = requests
        wanted = min(10, max(1, -(-requests // 4)))
        target, state = _apply_delay_logic(wanted, target, config, state, _now=float(now))
        for unit, replicas in formula.targets(known, held, float(now)).items():
            held.ask(unit, replicas, float(now))
        held.pass_time(now + 0.5, 0.5)
        assert held.target[0] == target

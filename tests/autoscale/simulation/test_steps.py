"""Step times: the slowest group counts, replicas shorten it, routers crowd each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.simulation.steps import Layout, Moment, StepModel


def layout(shares: list[float], shared: bool = True, **changes: float) -> Layout:
    values = {"step_s": 0.0, "token_s": 0.0, "hop_s": 0.0, "call_rows": 0.0} | changes
    return Layout(
        shared, np.array(shares)[None, None], 1, 1, backbones=1, max_sequences=8, max_batch_tokens=100, **values
    )


def moment(capacity: list[float], active: float = 1.0, decoding: int = 0, engines: int = 1) -> Moment:
    one = np.ones(1)
    return Moment(engines, np.array(capacity), decoding, one, one, np.array([1.0, 0.0]), active, 1.0)


def test_a_step_lasts_as_long_as_its_slowest_group():
    steps = StepModel(layout([0.5, 0.3, 0.2], step_s=0.01, hop_s=0.002)).at(moment([100, 100, 100]))
    assert steps.step_s[0] == pytest.approx(0.01 + 0.002 + 0.5)
    steps = StepModel(layout([0.5, 0.3, 0.2], step_s=0.01, hop_s=0.002)).at(moment([200, 100, 100]))
    assert steps.step_s[0] == pytest.approx(0.01 + 0.002 + 0.3)


def test_sequences_that_decode_take_their_part_of_the_batch():
    model = StepModel(layout([1.0], token_s=0.001))
    steps = model.at(moment([1000], decoding=40))
    assert steps.chunk_tokens == 60
    assert steps.step_s.tolist() == pytest.approx([100 * 0.001 + 0.1, 40 * 0.001 + 0.04])


def test_four_routers_that_compute_2_and_think_8_ms_wait_4_for_each_layer():
    model = StepModel(layout([1.0], step_s=0.008))
    steps = model.at(moment([50_000], active=4.0))
    assert steps.wait_s[0, 0, 0] == pytest.approx(0.004)
    assert steps.step_s[0] == pytest.approx(0.012)


def test_whole_models_never_meet_at_a_group():
    steps = StepModel(layout([1.0], shared=False, step_s=0.008)).at(moment([50_000], active=4.0, engines=4))
    assert steps.step_s[0] == pytest.approx(0.010)


@given(
    routers=st.floats(1, 64),
    capacity=st.floats(1e3, 1e7),
    think=st.floats(1e-4, 0.1),
)
def test_a_group_is_never_more_than_busy_and_a_router_never_faster_for_company(routers, capacity, think):
    model = StepModel(layout([0.7, 0.3], step_s=think))
    alone = model.at(moment([capacity] * 2))
    crowded = model.at(moment([capacity] * 2, active=routers))
    assert crowded.step_s[0] >= alone.step_s[0] - 1e-12
    busy = routers * crowded.alone_s[0, 0] / crowded.step_s[0]
    assert np.all(busy <= 1 + 1e-6)
    # Nor is it slower than if all the others went first, each time.
    assert crowded.step_s[0] <= think + routers * alone.wait_s[0].max() * (1 + 1e-9)


@given(replicas=st.integers(1, 50), call_rows=st.floats(0, 1000))
def test_one_more_replica_never_makes_a_step_longer(replicas, call_rows):
    model = StepModel(layout([0.6, 0.4], step_s=0.01, call_rows=call_rows))
    one, more = (model.at(moment([100.0 * n, 500], active=3.0)).step_s[0] for n in (replicas, replicas + 1))
    assert more <= one + 1e-12

"""Replicas: every device is counted from the asking to the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscale.simulation.machines import Lives, Machines, Unit

QUIET = Lives(start_s=4.0, start_sigma=0.0, drain_s=2.0, mtbf_s=None)
UNITS = [Unit("experts-0", 0, "default", 1, 1.0, 100.0), Unit("whole", None, "default", 4, 2.0)]


def test_a_replica_is_ready_after_its_start_and_costs_from_the_asking():
    machines = Machines(UNITS, QUIET, [1, 0], 0)
    machines.ask(0, 3, 0.0)
    for tick in range(1, 8):
        machines.pass_time(tick * 0.5, 0.5)
    assert machines.ready.tolist() == [1, 0]
    machines.pass_time(4.0, 0.5)
    assert machines.ready.tolist() == [3, 0]
    assert machines.device_s == pytest.approx(3 * 4.0)


def test_a_replica_taken_back_holds_its_device_until_it_is_drained():
    machines = Machines(UNITS, QUIET, [0, 2], 0)
    machines.ask(1, 1, 0.0)
    assert machines.ready.tolist() == [0, 1]
    assert machines.devices == 8
    for tick in range(1, 7):
        machines.pass_time(tick * 0.5, 0.5)
    assert machines.devices == 4
    assert machines.device_s == pytest.approx(4 * (2 * 2.0 + 1 * 1.0))
    assert machines.cost_s == pytest.approx(2 * machines.device_s)


def test_what_is_still_starting_is_taken_back_first():
    machines = Machines(UNITS, QUIET, [1, 0], 0)
    machines.ask(0, 3, 0.0)
    machines.ask(0, 1, 1.0)
    assert machines.ready.tolist() == [1, 0]
    assert machines.leaving.tolist() == [0, 0]
    machines.pass_time(10.0, 10.0)
    assert machines.ready.tolist() == [1, 0]


def test_a_dead_replica_is_replaced_after_a_start():
    lives = Lives(start_s=4.0, start_sigma=0.0, drain_s=2.0, mtbf_s=1.0)
    machines = Machines(UNITS, lives, [5, 1], 0)
    lost = machines.pass_time(1.0, 1.0)
    assert lost
    assert machines.deaths == len(lost)
    assert machines.ready.sum() == 6 - len(lost)
    assert machines.target.tolist() == [5, 1]


@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), max_size=40),
    mtbf_s=st.none() | st.floats(5, 500),
    seed=st.integers(0, 3),
)
def test_ready_and_starting_are_the_target_whatever_is_asked_for(asked, mtbf_s, seed):
    machines = Machines(UNITS, Lives(3.0, 0.3, 2.0, mtbf_s), [1, 1], seed)
    for tick, (unit, replicas) in enumerate(asked):
        machines.ask(unit, replicas, float(tick))
        machines.pass_time(tick + 1.0, 1.0)
        starting = [len(machines._starting.get(each, [])) for each in range(2)]
        assert (machines.ready + starting).tolist() == machines.target.tolist()
        assert machines.ready.min() >= 0
        assert machines.leaving.min() >= 0
    if mtbf_s is None:
        machines.pass_time(1e6, 1.0)
        assert machines.ready.tolist() == machines.target.tolist()
        assert machines.leaving.tolist() == [0, 0]

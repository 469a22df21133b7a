"""The queue: work is conserved, nobody jumps it, and Little's law holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscale.simulation.requests import Requests
from autoscale.traces import Trace

TOKEN_S = np.array([0.001])


def queue(arrival: list[float], prompt: list[int], generated: list[int]) -> Requests:
    trace = Trace(np.array(arrival), np.array(prompt), np.array(generated))
    return Requests(trace, np.zeros(len(arrival), dtype=np.int64), 1)


def drive(requests: Requests, ticks: int, tick_s: float = 0.5, engines: int = 1, slots: int = 1000) -> None:
    """token_s 1 ms a prompt token; 10 decode steps a second."""
    for tick in range(ticks):
        requests.arrive((tick + 1) * tick_s)
        requests.compute(tick * tick_s, tick_s, TOKEN_S, engines, slots, (10.0, 10.0))
        requests.decode((tick + 1) * tick_s, 10 * tick_s)


def test_a_lone_request_waits_for_nothing_and_takes_its_own_time():
    requests = queue([0.2], [300], [11])
    drive(requests, 6)
    assert requests.start_s.tolist() == pytest.approx([0.2])
    assert requests.first_s.tolist() == pytest.approx([0.5])
    assert requests.finish_s().tolist() == pytest.approx([1.5])
    assert requests.done == 1


def test_a_second_request_waits_for_the_first_across_ticks():
    requests = queue([0.0, 0.1], [2000, 500], [1, 1])
    drive(requests, 8)
    assert requests.start_s.tolist() == pytest.approx([0, 2.0])
    assert requests.first_s.tolist() == pytest.approx([2.0, 2.5])
    assert requests.finish_s().tolist() == pytest.approx([2.0, 2.5])


def test_two_engines_halve_the_queue_but_not_the_time_of_one_prompt():
    requests = queue([0.0, 0.0, 0.0], [1000] * 3, [1] * 3)
    drive(requests, 8, engines=2)
    assert requests.start_s.tolist() == pytest.approx([0, 0.5, 1.0])
    assert requests.first_s.tolist() == pytest.approx([1.0, 1.5, 2.0])


def test_a_request_without_a_slot_waits_until_one_has_ended():
    requests = queue([0.0, 0.0], [100, 100], [31, 31])
    drive(requests, 20, slots=1)
    first, second = requests.start_s
    assert requests.finish_s()[0] == pytest.approx(3.1)
    assert 3.1 <= second <= 3.1 + 2 * 0.5
    assert first == 0


def test_work_of_a_dead_engine_is_done_again_before_others():
    requests = queue([0.0, 0.6], [400, 100], [100, 1])
    drive(requests, 1)
    requests.redo(1.0)
    for tick in range(1, 5):
        requests.arrive((tick + 1) * 0.5)
        requests.compute(tick * 0.5, 0.5, TOKEN_S, 1, 100, (10.0, 10.0))
    assert requests.reworked_tokens == pytest.approx(400)
    assert requests.start_s[1] == pytest.approx(0.9)


def test_without_an_engine_nothing_happens():
    requests = queue([0.0], [100], [5])
    drive(requests, 4, engines=0)
    assert requests.waiting == 1
    assert requests.served_tokens == 0


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    gaps = draw(st.lists(st.floats(0, 3), min_size=1, max_size=40))
    sizes = st.lists(st.integers(1, 3000), min_size=len(gaps), max_size=len(gaps))
    return np.cumsum(gaps).tolist(), draw(sizes), draw(sizes)


@settings(max_examples=60)
@given(load=loads(), tick_s=st.sampled_from([0.1, 0.5, 1.0]), engines=st.integers(1, 5), slots=st.integers(1, 30))
def test_tokens_are_computed_once_in_order_and_never_before_they_came(load, tick_s, engines, slots):
    arrival, prompt, generated = load
    requests = queue(arrival, prompt, generated)
    drive(requests, 200, tick_s, engines, slots)
    begun = ~np.isnan(requests.start_s)
    first = requests.first_s[: requests.computed]
    assert np.all(np.diff(requests.start_s[begun]) >= 0)
    assert np.all(requests.start_s[begun] >= np.array(arrival)[begun])
    own_s = np.array(prompt)[: requests.computed] * TOKEN_S[0]
    assert np.all(first >= requests.start_s[: requests.computed] + own_s - 1e-9)
    computed = sum(prompt[: requests.computed])
    rest = prompt[requests.computed] if requests.computed < len(prompt) else 0
    assert computed - 1e-6 <= requests.served_tokens <= computed + rest + 1e-6
    assert requests.arrived == requests.waiting + int(requests.decoding.sum()) + requests.done
    assert requests.computed - requests.done <= slots


@given(load=loads(), engines=st.integers(1, 5))
def test_times_do_not_depend_on_the_tick(load, engines):
    arrival, prompt, generated = load
    coarse, fine = queue(arrival, prompt, generated), queue(arrival, prompt, generated)
    drive(coarse, 200, 1.0, engines, 10**6)
    drive(fine, 800, 0.25, engines, 10**6)
    done = slice(0, min(coarse.computed, fine.computed))
    assert coarse.start_s[done] == pytest.approx(fine.start_s[done], abs=1e-6)


def test_littles_law_holds():
    rng = np.random.default_rng(3)
    arrival = np.cumsum(rng.exponential(1.0, 2000))
    requests = queue(arrival.tolist(), rng.integers(1, 1400, 2000).tolist(), rng.integers(1, 40, 2000).tolist())
    inside = []
    for tick in range(4600):
        requests.arrive((tick + 1) * 0.5)
        requests.compute(tick * 0.5, 0.5, TOKEN_S, 1, 10**6, (10.0, 10.0))
        requests.decode((tick + 1) * 0.5, 5.0)
        inside.append(requests.arrived - requests.done)
    finish = requests.finish_s()
    assert np.isfinite(finish).all()
    spent = float((finish - arrival).sum())
    # The count is read at the ends of ticks: half a tick of error for each request, and a step of the clock.
    assert np.sum(inside) * 0.5 == pytest.approx(spent, rel=0.03)


def test_the_queue_in_front_of_one_engine_is_that_of_the_textbook():
    rng = np.random.default_rng(5)
    arrival = np.cumsum(rng.exponential(1.0, 20000))
    requests = queue(arrival.tolist(), [700] * 20000, [1] * 20000)
    drive(requests, 41000, 0.5)
    wait = requests.start_s[: requests.computed] - arrival[: requests.computed]
    # M/D/1 at 70 % of its capacity: rho * service / (2 (1 - rho)).
    assert wait.mean() == pytest.approx(0.7 * 0.7 / (2 * 0.3), rel=0.1)

"""The Directory's metrics, with a recorder for Ray and a clock that is a number. Milliseconds."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import Address, Epoch, Replica, State, View
from cluster.metrics import (
    DEGRADED,
    EXPERT_ROWS_PER_S,
    IMBALANCE,
    POLICY_SILENCE_S,
    READY_REPLICAS,
    REPLICAS,
    ROUTERS,
    START_FAILURES,
)
from deployments.directory_metering import (
    MOST_SERIES,
    NAMED_S,
    OTHER,
    RATE_WINDOW_S,
    DirectoryMetering,
    Standing,
    busiest_kept,
    filled,
)
from tests.recorder import Recorder

HERE = Address("node", "socket", "127.0.0.1", 7000)
DIGEST = "ab" * 32
DEEPSEEK = (61, 256)
"""Layers and experts a layer of the largest model this is for."""


class Directory:
    """What the metering is told, a second at a time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.replicas: list[Replica] = []
        self.rows: dict[int, np.ndarray] = {}
        self.more: Mapping[str, object] = {}
        self.metering = DirectoryMetering(self.standing, lambda: self.now_s)

    def standing(self) -> Standing:
        rows = {layer: totals.copy() for layer, totals in self.rows.items()}
        view = View(Epoch("one", 1), tuple(self.replicas))
        groups = ("experts-0", "experts-1")
        facts = {"groups": groups, "ready": {}, "routers": 2, "failed_starts": {}, "rows": rows} | self.more
        return Standing(view, **facts)  # type: ignore[arg-type]

    def second(self, rows: Mapping[int, list[int]] | None = None) -> Recorder:
        """What is told after a second in which experts got so many rows more."""
        self.now_s += 1.0
        for layer, more in (rows or {}).items():
            self.rows[layer] = self.rows.get(layer, np.zeros(len(more), np.int64)) + np.array(more)
        told = Recorder()
        self.metering.tell(told.meter)
        return told


@pytest.fixture
def directory() -> Directory:
    return Directory()


def replica(id: str, group: str = "experts-0", pool: str = "default", state: State = State.READY, digest: str = DIGEST):
    return Replica(id, group, pool, HERE, digest, 100.0, state)


def by_expert(told: Recorder, layer: int) -> dict[str, float]:
    found = {}
    for (name, labels), value in told.values.items():
        if name == EXPERT_ROWS_PER_S.name and dict(labels)["layer"] == str(layer):
            found[dict(labels)["expert"]] = value
    return found


def test_replicas_are_counted_by_state_and_those_that_are_gone_are_told_as_zero(directory: Directory) -> None:
    directory.replicas = [replica("a"), replica("b", pool="h100", state=State.JOINING)]
    told = directory.second()
    assert told.of(REPLICAS, group="experts-0", pool="default", state="ready") == 1
    assert told.of(REPLICAS, group="experts-0", pool="h100", state="joining") == 1
    assert told.of(REPLICAS, group="experts-1", pool="default", state="ready") == 0
    directory.replicas = []
    assert directory.second().of(REPLICAS, group="experts-0", pool="h100", state="joining") == 0


def test_ready_replicas_are_told_by_group(directory: Directory) -> None:
    directory.more = {"ready": {"experts-0": 0, "experts-1": 1}}
    told = directory.second()
    assert told.of(READY_REPLICAS, group="experts-0") == 0
    assert told.of(READY_REPLICAS, group="experts-1") == 1
    assert told.of(ROUTERS) == 2


def test_failed_starts_are_counted_and_reasons_are_told_whether_or_not_they_hold(directory: Directory) -> None:
    assert directory.second().of(START_FAILURES, part="experts-0") == 0
    directory.more = {"failed_starts": {"router": 2}, "degraded": {"signals": True, "policy": False}}
    told = directory.second()
    assert told.of(START_FAILURES, part="router") == 2
    assert (told.of(DEGRADED, reason="signals"), told.of(DEGRADED, reason="policy")) == (1, 0)
    assert POLICY_SILENCE_S.name not in told.names, "nobody scales"
    directory.more = {"policy_silence_s": 7.5}
    assert directory.second().of(POLICY_SILENCE_S) == 7.5


def test_rows_a_second_are_by_layer_and_expert_with_the_imbalance_of_the_layer(directory: Directory) -> None:
    directory.second({3: [0, 0, 0, 0], 5: [0, 0]})
    told = directory.second({3: [60, 0, 20, 0], 5: [0, 0]})
    assert by_expert(told, 3) == {"0": 60.0, "2": 20.0, OTHER: 0.0}
    assert by_expert(told, 5) == {OTHER: 0.0}
    assert told.of(IMBALANCE, layer="3") == pytest.approx(3.0)
    assert (IMBALANCE.name, (("layer", "5"),)) not in told.values, "no rows are neither balanced nor not"


def test_named_experts_are_chosen_anew_only_now_and_then_and_others_are_summed(directory: Directory) -> None:
    layers, experts = DEEPSEEK
    first, later = [0] * experts, [0] * experts
    first[:8], later[100:108] = [10] * 8, [50] * 8
    directory.second(dict.fromkeys(range(layers), [0] * experts))
    assert set(by_expert(directory.second(dict.fromkeys(range(layers), first)), 0)) == {*map(str, range(8)), OTHER}
    told = by_expert(directory.second(dict.fromkeys(range(layers), later)), 0)
    assert set(told) == {*map(str, range(8)), OTHER}
    assert sum(told.values()) == pytest.approx((80 + 400) / 2), "all values together are the layer"
    for _ in range(int(NAMED_S + RATE_WINDOW_S)):
        told = by_expert(directory.second(dict.fromkeys(range(layers), later)), 0)
    assert set(told) == {*map(str, range(100, 108)), OTHER}


def test_at_an_even_load_series_stay_few_over_the_time_that_ray_keeps_them(directory: Directory) -> None:
    layers, experts = DEEPSEEK
    rng, seen = np.random.default_rng(1), set[tuple[int, str]]()
    for _ in range(20):
        told = directory.second({layer: rng.integers(1, 1000, experts).tolist() for layer in range(layers)})
        seen |= {(layer, expert) for layer in range(layers) for expert in by_expert(told, layer)}
    assert len(seen) <= MOST_SERIES


def test_a_large_model_has_a_bounded_number_of_series_and_takes_little_time(directory: Directory) -> None:
    layers, experts = DEEPSEEK
    rng = np.random.default_rng(0)
    told = Recorder()
    for _ in range(2):
        told = directory.second({layer: rng.integers(1, 1000, experts).tolist() for layer in range(layers)})
    series = [labels for name, labels in told.values if name == EXPERT_ROWS_PER_S.name]
    assert len(series) == layers * (8 + 1) == 549
    started_s = time.thread_time()
    directory.second()
    assert time.thread_time() - started_s < 0.25, "once a second, in the loop that answers heartbeats"


@pytest.mark.parametrize("layers", [1, 4, 27, 61, 100, 300])
def test_whatever_the_number_of_layers_the_series_are_bounded(layers: int) -> None:
    assert layers * (busiest_kept(layers) + 1) <= MOST_SERIES


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 300), st.sets(st.integers(0, 9)))
def test_free_places_go_to_the_busiest_others(rows: list[float], kept: int, held: set[int]) -> None:
    before = [expert for expert in held if expert < len(rows)][:kept]
    named = filled(before, np.array(rows), kept)
    assert named[: len(before)] == before
    assert len(set(named)) == len(named) <= kept
    assert all(rows[expert] > 0 for expert in named[len(before) :])
    if len(named) < kept:
        assert all(value == 0 for expert, value in enumerate(rows) if expert not in named)

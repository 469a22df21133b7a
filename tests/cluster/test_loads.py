"""Loads of many routers: nothing is counted twice, and nothing is lost, whatever becomes of the reports. Under 2 s."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.loads import KEPT_STOPPED, LoadReport, RecordedLoads
from cluster.placement import balanced, read_load

GROUPS = ({2: (0, 3), 10: (1,)}, {2: (1, 2), 10: (0, 2)})
EXPERTS = {2: 4, 10: 3}


def report(router: str, rows: dict[int, list[int]], *, last: bool = False) -> LoadReport:
    return LoadReport(router, {layer: np.array(each, dtype=np.int64) for layer, each in rows.items()}, last)


def rows_of(loads: RecordedLoads) -> dict[int, list[int]]:
    file = loads.as_load_file()
    return dict(zip(file["layers"], file["domains"]["recorded"], strict=True))


def test_the_file_can_be_placed_by_before_and_after_the_first_row(tmp_path: Path) -> None:
    loads = RecordedLoads(GROUPS)
    for rows in ({2: [0] * 4, 10: [0] * 3}, {2: [9, 8, 2, 1], 10: [4, 4, 8]}):
        assert loads.take(report("r", rows))
        path = tmp_path / "loads.json"
        path.write_text(json.dumps(loads.as_load_file()))
        assert read_load(path) == rows
        assert len(balanced(EXPERTS, 2, read_load(path)).groups) == 2
    assert balanced(EXPERTS, 2, read_load(path)).owner == {2: (0, 1, 1, 0), 10: (1, 1, 0)}


def test_layers_are_in_order_whatever_the_order_of_reports() -> None:
    loads = RecordedLoads(({10: (0,), 2: (0, 1)},))
    loads.take(report("r", {10: [3], 2: [1, 2]}))
    assert loads.as_load_file() == {"layers": [2, 10], "domains": {"recorded": [[1, 2], [3]]}}


def test_a_report_of_other_experts_is_refused_and_changes_nothing() -> None:
    loads = RecordedLoads(GROUPS)
    for rows in (
        {2: [1] * 4},
        {2: [1] * 4, 10: [1] * 4},
        {2: [1] * 4, 10: [1] * 3, 11: [1]},
        {3: [1] * 4, 10: [1] * 3},
    ):
        assert not loads.take(report("r", rows))
    assert rows_of(loads) == {2: [0] * 4, 10: [0] * 3}


def test_a_router_that_has_stopped_is_not_counted_again() -> None:
    loads = RecordedLoads(GROUPS)
    final = report("r", {2: [1, 2, 3, 4], 10: [5, 6, 7]}, last=True)
    for _ in range(2):
        loads.take(final)
    loads.take(report("r", {2: [1, 2, 3, 0], 10: [5, 6, 0]}))
    assert rows_of(loads) == {2: [1, 2, 3, 4], 10: [5, 6, 7]}
    assert not loads._by_router


def test_a_report_may_be_of_memory_nobody_can_write_to() -> None:
    loads = RecordedLoads(({0: (0,)},))
    rows = np.array([4])
    rows.flags.writeable = False
    for router in "ab":
        loads.take(LoadReport(router, {0: rows}, last=router == "a"))
    assert rows_of(loads) == {0: [8]}


@given(st.data())
def test_the_sum_is_what_all_routers_sent_however_reports_are_lost_repeated_and_mixed_up(data: st.DataObject) -> None:
    loads = RecordedLoads(({0: (0, 1)},))
    expected = np.zeros(2, dtype=np.int64)
    on_the_way: list[LoadReport] = []
    for router in range(data.draw(st.integers(1, 4))):
        total = np.zeros(2, dtype=np.int64)
        for _ in range(data.draw(st.integers(0, 4))):
            total = total + data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
            on_the_way += [report(f"r{router}", {0: total.tolist()})] * data.draw(st.integers(0, 2))
        heard_last = report(f"r{router}", {0: total.tolist()}, last=data.draw(st.booleans()))
        on_the_way += [heard_last] * data.draw(st.integers(1, 2))
        expected += total
    for each in data.draw(st.permutations(on_the_way)):
        assert loads.take(each)
    assert rows_of(loads) == {0: expected.tolist()}


def test_only_the_last_routers_that_stopped_are_remembered():
    loads = RecordedLoads([{0: (0, 1)}])
    for number in range(KEPT_STOPPED + 1):
        loads.take(LoadReport(str(number), {0: np.array([1, 0])}, last=True))
    assert len(loads._stopped) == KEPT_STOPPED
    loads.take(LoadReport(str(KEPT_STOPPED), {0: np.array([9, 9])}))
    assert loads.as_load_file()["domains"] == {"recorded": [[KEPT_STOPPED + 1, 0]]}

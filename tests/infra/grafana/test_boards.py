"""The dashboards: as built from `panels.py`, complete, and about metrics that there are. No Grafana.

That every query returns data: `tests/e2e/test_dashboards_grafana.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cluster.metrics import METRICS
from infra.grafana.build import text
from infra.grafana.panels import BOARDS
from infra.grafana.words import Board
from tests.serving import ROOT

UNITS = {"reqps", "short", "s", "percentunit", "Bps"}
ELSEWHERE: dict[str, str] = {
    "expertscale_batch_rows": "its mean is exact by counters, and shown so",
    "expertscale_ready_replicas": "an alert; the board shows replicas by state",
    "expertscale_sent_rows_total": "rows are counted where they are computed",
}
"""Metrics on no board, and why."""


def panels(board: Board) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(text(board))["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_file_is_what_the_builder_makes(board: Board) -> None:
    file = ROOT / "infra" / "grafana" / f"{board.name}.json"
    assert file.read_text() == text(board), "out of date: make boards"


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_each_panel_says_what_it_shows_in_which_unit_from_the_chosen_source(board: Board) -> None:
    shown = panels(board)
    assert len({panel["title"] for panel in shown}) == len(shown)
    for panel in shown:
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_no_panel_lies_on_another(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(text(board))["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_boards_can_be_told_apart_and_choose_source_and_application() -> None:
    made = [json.loads(text(board)) for board in BOARDS]
    assert len({board["uid"] for board in made}) == len({board["title"] for board in made}) == 3
    for board in made:
        variables = {each["name"]: each["type"] for each in board["templating"]["list"]}
        assert variables == {"datasource": "datasource", "application": "query"}
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)


def test_every_metric_is_on_a_board_or_elsewhere_for_a_reason() -> None:
    named = set()
    for board in BOARDS:
        named |= set(re.findall(r"\bray_(expertscale_\w+)", text(board)))
    named = {name.removesuffix("_bucket") for name in named}
    known = {metric.name for metric in METRICS}
    assert named <= known
    assert known - named == set(ELSEWHERE)

"""What a figure says of its target, and how figures are shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from infra.bench.figures import Figure, compared, json_line, table
from infra.bench.measure import Samples

FIGURE = Figure("fabric", "T=8", "transport", 300.0, "us", "sockets", 200.0, spread=0.04, target=1.5)
BARE = Figure("startup", "demo", "time", 3.0, "s")


def test_a_ratio_is_the_value_by_the_reference() -> None:
    assert FIGURE.ratio == 1.5
    assert BARE.ratio is None
    assert replace(FIGURE, reference=0.0).ratio is None


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [(299.0, True, True), (300.0, True, True), (301.0, True, False), (300.0, False, True), (299.0, False, False)],
)
def test_a_target_is_met_from_its_side_and_by_equality(value: float, at_most: bool, met: bool) -> None:
    assert replace(FIGURE, value=value, at_most=at_most).met is met


def test_nothing_promised_is_neither_met_nor_missed() -> None:
    assert replace(FIGURE, target=None).met is None
    assert replace(BARE, target=1.0).met is None


def test_two_sides_are_compared_by_their_medians_with_their_spreads() -> None:
    figure = compared(
        "s", "c", "w", Samples((1.0, 2.0, 9.0)), "a", Samples((4.0, 4.0, 5.0)), unit="ms", target=0.4, at_most=False
    )
    spreads = Samples((1.0, 2.0, 9.0)).spread, Samples((4.0, 4.0, 5.0)).spread
    assert figure == Figure("s", "c", "w", 2.0, "ms", "a", 4.0, spreads[0], 0.4, False, spreads[1])
    assert figure.met


def test_a_table_has_a_head_and_a_line_a_figure_in_aligned_columns() -> None:
    lines = table([FIGURE, BARE, replace(FIGURE, what="a much longer name", value=12345.6)]).splitlines()
    assert len(lines) == 4
    for title, cell in {"measured": "300 us", "against": "sockets", "ratio": "1.5", "target": "<= 1.5"}.items():
        assert lines[1].startswith(cell, lines[0].index(title))
    assert lines[3].startswith("12,346 us", lines[0].index("measured"))
    assert all(line == line.rstrip() for line in lines)


def test_a_table_says_which_targets_were_met() -> None:
    missed = replace(FIGURE, at_most=False, target=2.0)
    words = [line.split()[-1] for line in table([FIGURE, missed]).splitlines()[1:]]
    assert words == ["met", "MISSED"]
    assert ">= 2" in table([missed])


def test_a_table_without_figures_is_its_head() -> None:
    assert table([]).startswith("side")


@pytest.mark.parametrize(("value", "shown"), [(0.01234, "0.0123 us"), (99.96, "100 us"), (1234567.0, "1,234,567 us")])
def test_numbers_have_three_digits_and_no_exponent(value: float, shown: str) -> None:
    assert shown in table([replace(FIGURE, value=value)])


def test_the_json_line_is_one_line_with_everything() -> None:
    line = json_line([FIGURE, BARE], seconds=1.5)
    assert "\n" not in line
    read = json.loads(line)
    assert read["seconds"] == 1.5
    first, second = read["figures"]
    assert (first["value"], first["reference"], first["ratio"], first["met"]) == (300.0, 200.0, 1.5, True)
    assert (second["what"], second["ratio"], second["met"]) == ("time", None, None)

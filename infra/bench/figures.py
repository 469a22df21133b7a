"""One result of a benchmark, and how results are shown: a table for people, one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.bench.measure import Samples


@dataclass(frozen=True)
class Figure:
    """`value` of `what`, beside `against` measured in the same run.

    side: the benchmark. case: model and sizes. unit: of value and reference. ratio: value / reference.
    spread, reference_spread: of the samples of each, see `Samples.spread`.
    target: what the ratio is to reach; `at_most` says from which side. None where nothing was promised.
    """

    side: str
    case: str
    what: str
    value: float
    unit: str
    against: str = ""
    reference: float | None = None
    spread: float = 0.0
    target: float | None = None
    at_most: bool = True
    reference_spread: float = 0.0

    @property
    def ratio(self) -> float | None:
        """value / reference."""
        return self.value / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def compared(
    side: str,
    case: str,
    what: str,
    value: Samples,
    against: str,
    reference: Samples,
    *,
    unit: str,
    target: float | None = None,
    at_most: bool = True,
) -> Figure:
    """The figure of two sides that were measured in turn."""
    return Figure(
        side,
        case,
        what,
        value.median,
        unit,
        against,
        reference.median,
        value.spread,
        target,
        at_most,
        reference.spread,
    )


def table(figures: Sequence[Figure]) -> str:
    """Aligned columns, one line a figure."""
    head = ("side", "case", "what", "measured", "±", "against", "reference", "±", "ratio", "target", "")
    rows = [head, *(_cells(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def json_line(figures: Sequence[Figure], **about: Any) -> str:
    """Everything on one line."""
    rows = [{**asdict(figure), "ratio": figure.ratio, "met": figure.met} for figure in figures]
    return json.dumps({**about, "figures": rows})


def _cells(figure: Figure) -> tuple[str, ...]:
    sign = "<=" if figure.at_most else ">="
    return (
        figure.side,
        figure.case,
        figure.what,
        f"{_number(figure.value)} {figure.unit}",
        f"{figure.spread:.0%}" if figure.spread else "",
        figure.against,
        "" if figure.reference is None else f"{_number(figure.reference)} {figure.unit}",
        f"{figure.reference_spread:.0%}" if figure.reference_spread else "",
        "" if figure.ratio is None else _number(figure.ratio),
        "" if figure.target is None else f"{sign} {figure.target:g}",
        {None: "", True: "met", False: "MISSED"}[figure.met],
    )


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

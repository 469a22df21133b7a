"""Which replica computes which rows of a group: pure functions of loads and speeds.

One replica takes all rows where that is fast: the one expected to finish first. Where the rows would keep it busy for
longer than two hops, they are cut into runs for several replicas such that all finish at the same time (water
filling: with idle replicas, in proportion to speed). Rows are sorted by expert, so a run is mostly whole experts, and
a cut close to the end of an expert moves there.
Knows no transport, no clock and no failure: callers leave out replicas that must not be chosen. Deterministic;
`turn` rotates ties, so that equal replicas are chosen equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOPS_WORTH_SPLITTING = 2.0
"""A second replica costs a hop; below two hops of work it cannot pay."""

SNAP_SHARE = 0.125
"""A cut moves to the nearest end of an expert if that changes no neighbouring share by more than this part of it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica that may be chosen.

    load_rows: rows that are before ours, in flight or reported as queued. speed_rows_per_s: above 0.
    """

    load_rows: float
    speed_rows_per_s: float


@dataclass(frozen=True, slots=True)
class Share:
    """Rows `start` to `stop` of the group's sorted rows go to candidate number `candidate`."""

    candidate: int
    start: int
    stop: int


def split(candidates: Sequence[Candidate], counts: Sequence[int], hop_s: float, turn: int) -> list[Share]:
    """Distribute sum(counts) >= 1 rows, sorted by expert with `counts` rows each: every row in exactly one share.

    hop_s: a round trip without the computation. Shares are not empty and stand in order of `start`; runs follow the
    order of the candidates, so a replica meets about the same experts again and finds their weights in its cache.
    """
    rows = sum(counts)
    ranking = _by_finish_time(candidates, rows, turn)
    service_s = rows / candidates[ranking[0]].speed_rows_per_s
    if len(candidates) == 1 or service_s <= HOPS_WORTH_SPLITTING * hop_s:
        return [Share(ranking[0], 0, rows)]
    most = len(candidates) if service_s >= len(candidates) * hop_s else int(service_s / hop_s)
    chosen = sorted(ranking[:most])
    shares = _whole_rows(_fill([candidates[c] for c in chosen], rows), rows, turn)
    cuts = _snap([min(cut, rows) for cut in _cuts(shares)[:-1]] + [rows], counts)
    return [
        Share(candidate, start, stop)
        for candidate, start, stop in zip(chosen, cuts[:-1], cuts[1:], strict=True)
        if stop > start
    ]


def _by_finish_time(candidates: Sequence[Candidate], rows: int, turn: int) -> list[int]:
    size = len(candidates)
    if size == 1:
        return [0]

    def rank(index: int) -> tuple[float, int]:
        candidate = candidates[index]
        return (candidate.load_rows + rows) / candidate.speed_rows_per_s, (index - turn) % size

    return sorted(range(size), key=rank)


def _fill(candidates: Sequence[Candidate], rows: int) -> list[float]:
    """Rows for each candidate such that all that get any finish at the same time, and none of the others sooner."""
    order = sorted(range(len(candidates)), key=lambda i: candidates[i].load_rows / candidates[i].speed_rows_per_s)
    speed = load = 0.0
    shares = [0.0] * len(candidates)
    used = 0
    finish_s = 0.0
    for index in order:
        candidate = candidates[index]
        if used and finish_s <= candidate.load_rows / candidate.speed_rows_per_s:
            break
        speed += candidate.speed_rows_per_s
        load += candidate.load_rows
        finish_s = (rows + load) / speed
        used += 1
    for index in order[:used]:
        shares[index] = finish_s * candidates[index].speed_rows_per_s - candidates[index].load_rows
    return shares


def _whole_rows(shares: Sequence[float], rows: int, turn: int) -> list[int]:
    """Round shares to whole rows that sum to `rows`: the largest remainders are rounded up, ties rotate."""
    whole = [int(share) for share in shares]
    size = len(shares)
    remainders = sorted(range(size), key=lambda i: (whole[i] - shares[i], (i - turn) % size))
    for index in remainders[: rows - sum(whole)]:
        whole[index] += 1
    return whole


def _cuts(shares: Sequence[int]) -> list[int]:
    cuts = [0]
    for share in shares:
        cuts.append(cuts[-1] + share)
    return cuts


def _snap(cuts: list[int], counts: Sequence[int]) -> list[int]:
    """Move inner cuts to the nearest end of an expert where little changes by it."""
    ends = _cuts(counts)
    snapped = list(cuts)
    for i in range(1, len(cuts) - 1):
        nearest = min(ends, key=lambda end: abs(end - cuts[i]))
        smaller = min(cuts[i] - cuts[i - 1], cuts[i + 1] - cuts[i])
        if abs(nearest - cuts[i]) <= SNAP_SHARE * smaller:
            snapped[i] = nearest
    return snapped

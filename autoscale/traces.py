"""Request traces: when requests came, and how many tokens they read and wrote. Loads three public formats. Pure but for
reading the file; knows no simulation.

    Azure LLM inference (CSV)   TIMESTAMP,ContextTokens,GeneratedTokens
    BurstGPT (CSV)              Timestamp, Session ID, Elapsed time, Model, Request tokens, Response tokens, ...
    Mooncake (JSON lines)       {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}

The format is told by the first line. Files may be compressed (`.gz`). Dimension: N requests.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_TOKENS = 10_000_000
MAX_REQUESTS = 20_000_000


class TraceError(ConfigError):
    """A trace file is no trace. One sentence with the file and the line."""


@dataclass(frozen=True)
class Trace:
    """N requests in the order they came.

    arrival_s[N]: ascending, the first at 0. prompt_tokens[N], generated_tokens[N]: at least 1 each.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    generated_tokens: Ints

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return float(self.arrival_s[-1])

    def __len__(self) -> int:
        return len(self.arrival_s)


Row = tuple[float, int, int]


def load(path: Path) -> Trace:
    """Read a trace. Requests that read or wrote nothing (failures, in BurstGPT) are left out; order does not matter.

    Raises:
        TraceError: the file cannot be read, is in no known format, or a line is wrong.
    """
    try:
        with _open(path) as lines:
            rows = [row for row in _rows(path, lines) if row[1] > 0 and row[2] > 0]
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}.") from None
    except (EOFError, zlib.error):
        raise TraceError(f"the trace {path} cannot be read: its compressed data is damaged.") from None
    except UnicodeDecodeError:
        raise TraceError(f"the trace {path} is no text.") from None
    except csv.Error as error:
        raise TraceError(f"the trace {path} is no CSV: {error}.") from None
    if not rows:
        raise TraceError(f"the trace {path} holds no request that read and wrote tokens.")
    return _trace(rows)


def stretch(trace: Trace, hours: float | None, rate_scale: float, swing: float, seed: int) -> Trace:
    """A longer or denser trace, the same for the same arguments.

    hours: repeat the trace end to end until then, with the rate of a day laid over it:
        1 + swing * cos(2 pi (hour - 14) / 24), busiest at 14:00, the first request at 0:00. None: as it is.
    rate_scale: that many requests for each one: the whole part of (scale * rate of the hour) copies, and one more with
        the probability of the rest. The bursts keep their shape; copies come up to 2 s later than the original.

    Raises:
        TraceError: there would be more than 20 million requests, or none.
    """
    rng = np.random.default_rng(seed)
    if hours is None and rate_scale == 1:
        return trace
    end_s = math.nextafter(trace.duration_s, math.inf) if hours is None else hours * 3600
    # The gap between two repetitions is an ordinary one.
    period_s = trace.duration_s + max(trace.duration_s / len(trace), 1e-3)
    repetitions = max(1, math.ceil(end_s / period_s))
    if len(trace) * repetitions * max(rate_scale, 1) > MAX_REQUESTS:
        raise TraceError(
            f"--repeat-to and --rate-scale ask for {len(trace) * repetitions * rate_scale:,.0f} requests; "
            f"allowed: {MAX_REQUESTS:,} at most."
        )
    arrival = (trace.arrival_s[None, :] + period_s * np.arange(repetitions)[:, None]).ravel()
    source = np.tile(np.arange(len(trace)), repetitions)
    kept = arrival < end_s
    arrival, source = arrival[kept], source[kept]
    rate = np.full(len(arrival), float(rate_scale))
    if hours is not None:
        rate *= 1 + swing * np.cos(2 * np.pi * (arrival / 3600 - 14) / 24)
    copies = np.floor(rate + rng.random(len(rate))).astype(np.int64)
    if not copies.sum():
        raise TraceError(f"--rate-scale {rate_scale:g} leaves none of {len(trace):,} requests; needed: one or more.")
    first = np.repeat(np.cumsum(copies) - copies, copies)
    later = np.arange(copies.sum()) > first
    times = np.repeat(arrival, copies) + np.where(later, rng.uniform(0, 2, copies.sum()), 0.0)
    order = np.argsort(times, kind="stable")
    source = np.repeat(source, copies)[order]
    times = times[order]
    return Trace(times - times[0], trace.prompt_tokens[source], trace.generated_tokens[source])


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _trace(rows: list[Row]) -> Trace:
    times = np.array([row[0] for row in rows], dtype=np.float64)
    order = np.argsort(times, kind="stable")
    tokens = np.array([row[1:] for row in rows], dtype=np.int64)[order]
    return Trace(times[order] - times[order[0]], tokens[:, 0], tokens[:, 1])


def _rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """(seconds, prompt tokens, generated tokens) of each line; blank lines are passed over."""
    rest = iter(lines)
    header, first = next(((n, line) for n, line in enumerate(rest, start=1) if line.strip()), (1, ""))
    first = first.strip().removeprefix("\ufeff")
    if first.startswith("{"):
        yield _jsonl_row(path, header, first)
        for number, line in enumerate(rest, start=header + 1):
            if line.strip():
                yield _jsonl_row(path, number, line)
        return
    columns = [name.strip() for name in first.split(",")]
    for names, read_time in ((_AZURE, _date_s), (_BURSTGPT, float)):
        if set(names) <= set(columns):
            yield from _csv_rows(path, rest, header, [columns.index(name) for name in names], read_time)
            return
    raise TraceError(
        f"{path}, line {header}: {first[:60]!r} begins no known trace; allowed: the header {','.join(_AZURE)} "
        f"(Azure), a header with {', '.join(_BURSTGPT)} (BurstGPT), or a JSON object with {', '.join(_MOONCAKE)} "
        f"(Mooncake)."
    )


_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


def _csv_rows(
    path: Path, lines: Iterator[str], header: int, columns: list[int], read_time: Callable[[str], float]
) -> Iterator[Row]:
    reader = csv.reader(lines)
    for fields in reader:
        if not any(field.strip() for field in fields):
            continue
        number = header + reader.line_num
        try:
            when, prompt, generated = (fields[column].strip() for column in columns)
        except IndexError:
            raise TraceError(
                f"{path}, line {number}: {len(fields)} fields; needed: {max(columns) + 1} or more."
            ) from None
        yield _time(path, number, when, read_time), _tokens(path, number, prompt), _tokens(path, number, generated)


def _jsonl_row(path: Path, number: int, line: str) -> Row:
    try:
        entry = json.loads(line)
        when, prompt, generated = (entry[name] for name in _MOONCAKE)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TraceError(f"{path}, line {number}: no JSON object with {', '.join(_MOONCAKE)}.") from None
    time_s = _time(path, number, when, lambda value: float(value) / 1e3)
    return time_s, _tokens(path, number, prompt), _tokens(path, number, generated)


def _time(path: Path, number: int, text: str, read: Callable[[str], float]) -> float:
    try:
        value = read(text)
        if math.isfinite(value):
            return value
    except (ValueError, TypeError, OverflowError):
        pass
    raise TraceError(f"{path}, line {number}: {text!r} is no time.")


def _tokens(path: Path, number: int, text: str) -> int:
    try:
        value = float(text)
        if value == int(value) and 0 <= value <= MAX_TOKENS:
            return int(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise TraceError(f"{path}, line {number}: {text!r} is no number of tokens; allowed: 0 to {MAX_TOKENS:,}.")


def _date_s(text: str) -> float:
    """Seconds of "2023-11-16 18:17:03.9799600"; a date without a zone is taken as UTC."""
    # Seven decimals are one more than `fromisoformat` reads on Python 3.11.
    whole, point, decimals = text.partition(".")
    digits = len(decimals) - len(decimals.lstrip("0123456789"))
    date = datetime.fromisoformat(whole + decimals[digits:])
    fraction = float(f"0.{decimals[:digits]}") if point and digits else 0.0
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() + fraction

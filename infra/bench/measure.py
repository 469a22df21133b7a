"""How the benchmarks measure: sides in turn (A B A B), medians with their spread, CPU seconds and memory of processes.

Knows nothing of what is measured. Machines are shared and noisy, so a figure is a ratio of two medians whose samples
were taken alternately in one run; a slow minute then slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in order of time."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the samples lie below."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median; 0 for a single sample."""
        if len(self.values) < 2 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / abs(self.median)


def alternate(sides: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int = 1) -> dict[str, Samples]:
    """Call every side once a round, in order, `rounds` times after `warm_up` rounds that do not count.

    A side returns what it measured (seconds, tokens per second, ...).
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            value = side()
            if number >= warm_up:
                taken[name].append(value)
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, between neighbours by proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def cpu_s(pids: Iterable[int]) -> float:
    """User and system seconds the processes have used so far; those that have ended count as nothing."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            # Neither counts too much: the kernel's sum comes in ticks of 10 ms, the threads' lacks those that ended.
            total += max(times.user + times.system, threads_cpu_s(pid))
    return total


def threads_cpu_s(pid: int) -> float:
    """Seconds, to the nanosecond, that the threads running now have used; 0 where the kernel does not tell."""
    total_ns = 0
    for schedule in Path("/proc", str(pid), "task").glob("*/schedstat"):
        # A thread may end between the two looks; a kernel without these statistics has an empty file or none.
        with suppress(OSError, IndexError):
            total_ns += int(schedule.read_text().split()[0])
    return total_ns / 1e9


def pss_bytes(pid: int) -> int:
    """Proportional set size: private memory plus a fair share of what is shared, so that sums mean something."""
    return int(psutil.Process(pid).memory_full_info().pss)

"""The processes of a running cluster by what they are, to be killed, stopped and looked at. Touches no others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

REPLICA = "ray::ServeReplica:"
PROXY, CONTROLLER = "ray::ProxyActor", "ray::ServeController"


class Processes:
    """Of the server whose root is `root`. application: its Serve name."""

    def __init__(self, root: psutil.Process, application: str) -> None:
        self._root = root
        self._application = application

    def of(self, deployment: str) -> list[int]:
        """The replicas of a deployment, oldest first, from the moment Ray has given them their names."""
        return self._titled(f"{REPLICA}{self._application}:{deployment}")

    @property
    def proxies(self) -> list[int]:
        """Serve's HTTP proxies."""
        return self._titled(PROXY)

    @property
    def controllers(self) -> list[int]:
        """Serve's controller."""
        return self._titled(CONTROLLER)

    def kinds(self) -> dict[str, list[int]]:
        """What each process is ("Router", "experts-0", ...) -> pids; replicas of this application only."""
        prefix = f"{REPLICA}{self._application}:"
        found: dict[str, list[int]] = {}
        for process, title in self._titles():
            if title.startswith(prefix):
                name = title.removeprefix(prefix).split(":")[0].split(".")[0]
                found.setdefault(name, []).append(process.pid)
        return found

    def _titled(self, title: str) -> list[int]:
        # The title ends there or goes on with the name of the method that runs: experts-1 is not experts-10.
        ends = (f"{title}.", f"{title}:")
        found = [process for process, name in self._titles() if f"{name}.".startswith(ends)]
        return [process.pid for process in sorted(found, key=lambda each: each.create_time())]

    def _titles(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in self._root.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if command := process.cmdline():
                    yield process, command[0]


def kill(pids: Sequence[int]) -> None:
    """kill -9."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """SIGSTOP until the block ends: a process that hangs, its sockets open."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@dataclass(frozen=True)
class Footprint:
    """What some processes hold together."""

    rss_bytes: int
    files: int
    threads: int


def footprint(pids: Sequence[int]) -> Footprint:
    """Of the processes that are still there."""
    rss = files = threads = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            rss += process.memory_info().rss
            files += process.num_fds()
            threads += process.num_threads()
    return Footprint(rss, files, threads)

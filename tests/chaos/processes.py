"""The processes of a running cluster by what they are, to be killed, stopped and looked at. Touches no others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from infra.bench.serve_rest import REPLICA, commands, titled

PROXY, CONTROLLER = "ray::ProxyActor", "ray::ServeController"


class Processes:
    """Of the server whose root is `root`. application: its Serve name."""

    def __init__(self, root: psutil.Process, application: str) -> None:
        self.root = root
        self._application = application

    def of(self, deployment: str) -> list[int]:
        """The replicas of a deployment, oldest first, from the moment Ray has given them their names."""
        return titled(self.root, f"{REPLICA}{self._application}:{deployment}")

    @property
    def proxies(self) -> list[int]:
        """Serve's HTTP proxies."""
        return titled(self.root, PROXY)

    @property
    def controllers(self) -> list[int]:
        """Serve's controller."""
        return titled(self.root, CONTROLLER)

    def kinds(self) -> dict[str, list[int]]:
        """What each process is ("Router", "experts-0", ...) -> pids; replicas of this application only."""
        prefix = f"{REPLICA}{self._application}:"
        found: dict[str, list[int]] = {}
        for process, command in commands(self.root):
            if command[0].startswith(prefix):
                name = command[0].removeprefix(prefix).split(":")[0].split(".")[0]
                found.setdefault(name, []).append(process.pid)
        return found


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
    """What some processes hold together, and how many they are."""

    rss_bytes: int = 0
    files: int = 0
    threads: int = 0
    processes: int = 0


def footprint(pids: Sequence[int]) -> Footprint:
    """Of the processes that are still there."""
    rss = files = threads = processes = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            rss += process.memory_info().rss
            files += process.num_fds()
            threads += process.num_threads()
            processes += 1
    return Footprint(rss, files, threads, processes)

"""Machines made of Linux namespaces: network, processes, /tmp/ray and /dev/shm of their own, one switch between them.

What is started in one sees neither the processes nor the addresses of another, so that `ray stop` ends one node only,
and nothing collides with what else runs on this computer. Needs root, and a kernel that lets it; `machines` raises
where that is not so.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.serving import ROOT

NEW_NETWORK = 0x40000000
"""CLONE_NEWNET, for setns(2)."""
LISTENING, LOOPBACK = "0A", {"0100007F", "00000000000000000000000001000000"}
"""As /proc/net/tcp has them."""
SWITCH, PREFIX = "switch", "10.77.0."
COMMAND_S = 90
_INSIDE = """
set -e
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec sleep infinity
"""


class NotAllowedError(Exception):
    """This user, or this computer, makes no namespaces."""


class ScriptError(Exception):
    """A script ended with another status than 0; its output."""


@dataclass(frozen=True)
class Machine:
    """One of them. pid: of its first process. environment: of every command that runs on it."""

    name: str
    address: str
    pid: int
    environment: Mapping[str, str]

    def run(self, script: str) -> str:
        """Run a script to its end; what it printed.

        Raises:
            ScriptError: it failed.
        """
        done = subprocess.run(self._command(script), timeout=COMMAND_S, check=False, **self._how())
        if done.returncode:
            raise ScriptError(f"on {self.name}, status {done.returncode}: {done.stdout[-4000:]}")
        return str(done.stdout)

    def start(self, script: str, log: Path) -> None:
        """Run a script that stays."""
        with log.open("ab") as output:
            subprocess.Popen(self._command(script), **(self._how() | {"stdout": output}))

    def commands(self) -> list[str]:
        """The command line of every process on it."""
        here, found = os.readlink(f"/proc/{self.pid}/ns/net"), []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                if os.readlink(f"/proc/{process.pid}/ns/net") == here:
                    found.append(" ".join(process.cmdline()).strip())
        return found

    def open_ports(self) -> set[int]:
        """The TCP ports of it that other machines reach."""
        found = set()
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{name}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, port = local.partition(":")
                if state == LISTENING and address not in LOOPBACK:
                    found.add(int(port, 16))
        return found

    def _command(self, script: str) -> list[str]:
        # Entering a mount namespace leaves the working folder behind.
        there = f"cd {shlex.quote(str(ROOT))}\n{script}"
        return ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "bash", "-ec", there]

    def _how(self) -> dict[str, Any]:
        return {
            "env": dict(self.environment),
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }


@contextmanager
def machines(names: list[str], environment: Mapping[str, str]) -> Iterator[dict[str, Machine]]:
    """So many, joined by a switch that belongs to the first; all they ran is gone at the end.

    Raises:
        NotAllowedError: there are no namespaces to be had.
    """
    with ExitStack() as undo:
        made: dict[str, Machine] = {}
        for number, name in enumerate(names, start=1):
            made[name] = Machine(name, f"{PREFIX}{number}", _first_process(undo), environment)
        first, *others = made.values()
        _ip(first, f"link add {SWITCH} type bridge")
        _ip(first, f"address add {first.address}/24 dev {SWITCH}")
        _ip(first, f"link set {SWITCH} up")
        for number, other in enumerate(others):
            _ip(first, f"link add port{number} type veth peer name eth0 netns {other.pid}")
            _ip(first, f"link set port{number} master {SWITCH} up")
            _ip(other, f"address add {other.address}/24 dev eth0")
            _ip(other, "link set eth0 up")
        yield made


@contextmanager
def inside(machine: Machine) -> Iterator[None]:
    """This thread, and the threads and processes that it starts, use the network of `machine`."""
    with open(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net", "rb") as before:
        with open(f"/proc/{machine.pid}/ns/net", "rb") as there:
            _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def carried_bytes(switch: Machine, number: int) -> int:
    """Bytes that have crossed the wire to the other machine of that number, in both directions."""
    folder = f"/sys/class/net/port{number}/statistics"
    with inside(switch):
        # A view of /sys shows the network of whoever mounted it.
        shown = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"mount -t sysfs sysfs /sys; cat {folder}/rx_bytes {folder}/tx_bytes"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout
    return sum(map(int, shown.split()))


def _first_process(undo: ExitStack) -> int:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        raise NotAllowedError("unshare or ip is not installed")
    process = subprocess.Popen(
        ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "bash", "-c", _INSIDE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    undo.callback(process.wait, 30)
    undo.callback(process.kill)
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != "ready":
        raise NotAllowedError(said)
    (child,) = psutil.Process(process.pid).children()
    return child.pid


def _ip(machine: Machine, arguments: str) -> None:
    subprocess.run(
        ["nsenter", "--target", str(machine.pid), "--net", "ip", *arguments.split()],
        check=True,
        capture_output=True,
        timeout=10,
    )


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")

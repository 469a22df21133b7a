"""A running Serve seen from outside: its REST API, and the processes of its replicas.

Knows the names of Ray's processes; starts and stops nothing.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ANSWER_S = 60.0
SOCKET_FOLDER_PREFIX = "xs-"
REPLICA = "ray::ServeReplica:"


class ServeRest:
    """Serve's REST API in the cluster that `served_by` (a `serve run`, or its parent) has started."""

    def __init__(self, served_by: psutil.Process) -> None:
        self._served_by = served_by
        self.dashboard_url = _dashboard_url(served_by)
        self._url = f"{self.dashboard_url}/api/serve/applications/"
        token = _ray_token()
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def deploy(self, applications: Sequence[Mapping[str, Any]]) -> None:
        """Make these the applications; what differs in numbers of replicas only is applied without a restart."""
        body = json.dumps({"applications": list(applications)}).encode()
        request = urllib.request.Request(self._url, body, self._headers, method="PUT")
        with urllib.request.urlopen(request, timeout=ANSWER_S):
            pass

    def replica_states(self, application: str) -> dict[str, list[str]]:
        """Deployment -> the states of its replicas, those that start and those that stop included."""
        return {name: [each["state"] for each in replicas] for name, replicas in self._replicas(application).items()}

    def replica_processes(self, application: str) -> dict[str, int]:
        """Serve's id of a replica -> pid, of all that it has placed."""
        return {
            replica["replica_id"]: replica["pid"]
            for replicas in self._replicas(application).values()
            for replica in replicas
            if replica["pid"]
        }

    def replica_pids(self, application: str, deployment: str) -> set[int]:
        """The processes of its replicas, from the moment Ray has given them their names."""
        return set(titled(self._served_by, f"{REPLICA}{application}:{deployment}"))

    def _replicas(self, application: str) -> dict[str, list[dict[str, Any]]]:
        request = urllib.request.Request(self._url, headers=self._headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            found = json.load(response)["applications"].get(application, {}).get("deployments", {})
        return {name: each["replicas"] for name, each in found.items()}


def titled(root: psutil.Process, title: str) -> list[int]:
    """The descendants of `root` that Ray has given this title, oldest first."""
    # The title ends there or goes on with the name of the method that runs: experts-1 is not experts-10.
    ends = (f"{title}.", f"{title}:")
    found = [process for process, command in commands(root) if f"{command[0]}.".startswith(ends)]
    return [process.pid for process in sorted(found, key=lambda each: each.create_time())]


def is_connected(pid: int) -> bool:
    """Whether a router is connected to the expert replica: its Unix socket is there once more than it listens."""
    with suppress(psutil.NoSuchProcess):
        paths = [Path(str(connection.laddr)) for connection in psutil.Process(pid).net_connections("unix")]
        return sum(path.parent.name.startswith(SOCKET_FOLDER_PREFIX) for path in paths) > 1
    return False


def commands(root: psutil.Process) -> Iterator[tuple[psutil.Process, list[str]]]:
    """Every descendant of `root` with its command line."""
    for process in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if command := process.cmdline():
                yield process, command


def _dashboard_url(served_by: psutil.Process) -> str:
    """Where Ray's dashboard listens, which takes new configs."""
    for _, command in commands(served_by):
        ports = [part.removeprefix("--port=") for part in command if part.startswith("--port=")]
        if ports and any(part.endswith("dashboard.py") for part in command):
            return f"http://127.0.0.1:{ports[0]}"
    raise RuntimeError("Ray's dashboard does not run")


def _ray_token() -> str | None:
    """The token Ray's dashboard asks for, from where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None

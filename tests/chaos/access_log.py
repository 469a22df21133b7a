"""The server's own account of requests: the access log of Serve's HTTP proxies, one line for each request.

Theirs, not the ingress's: that has no line for a request whose client hung up.
A request that its client gave a name (`X-Request-ID`) is found there under that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import psutil

from infra.bench.serve_rest import commands

LINE = re.compile(r" (?P<id>\S+) -- POST /v1/completions (?P<status>\S+) [\d.]+ms$", re.MULTILINE)
SESSION = re.compile(r"--session[-_]dir=(?P<folder>.+)")


class AccessLog:
    """Of the server whose root is `root`.

    Raises:
        RuntimeError: nothing that runs below the root says where Ray keeps its files.
    """

    def __init__(self, root: psutil.Process) -> None:
        self._folder = serve_logs(root)

    def statuses(self) -> dict[str, list[str]]:
        """Request id -> the statuses its requests were answered with: one where everything is in order."""
        found: dict[str, list[str]] = {}
        for file in self._folder.glob("proxy_*.log*"):
            for id, statuses in statuses_of(file.read_text(errors="replace")).items():
                found.setdefault(id, []).extend(statuses)
        return found


def statuses_of(log: str) -> dict[str, list[str]]:
    """The same of one file's text. What is no line of a completion is passed over."""
    found: dict[str, list[str]] = {}
    for line in LINE.finditer(log):
        found.setdefault(line["id"], []).append(line["status"])
    return found


def contradictions(told: Mapping[str, str], logged: Mapping[str, list[str]]) -> list[str]:
    """What clients and server say differently, one sentence for each request.

    told: request id -> the status its client saw, "" for one that hung up or saw none. logged: as of `statuses`;
    requests of others may be in it, all of `told` must be: once, with that status where the client saw one.
    """
    found = []
    for id, status in told.items():
        lines = logged.get(id, [])
        if len(lines) != 1:
            found.append(f"{id} is {len(lines)} times in the server's log, not once")
        elif status and lines != [status]:
            found.append(f"{id} was answered with {status} says its client, with {lines[0]} says the server")
    return found


def serve_logs(root: psutil.Process) -> Path:
    """The folder of Serve's log files, of what runs below `root`. Raises as `AccessLog`."""
    return _session_folder(root) / "logs" / "serve"


def _session_folder(root: psutil.Process) -> Path:
    for _, command in commands(root):
        for argument in command:
            if match := SESSION.fullmatch(argument):
                return Path(match["folder"])
    raise RuntimeError("no process of Ray names its session folder.")

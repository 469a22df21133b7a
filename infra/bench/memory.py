"""Memory of a running server: the proportional set size of each of its processes, named after what it does.

Knows the names Ray gives its processes. Shared pages (torch's libraries, weights mapped by several) count once, in
equal parts, so sums mean something. Whatever else maps the same files takes its part too, and should have ended before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import psutil

from infra.bench.figures import Figure
from infra.bench.http_load import Endpoint
from infra.bench.measure import pss_bytes
from infra.bench.models import BenchModel

SIDE = "serving"
MB = 1e6
PROCESS_MB = 450.0
"""What a process may take beside its part of the weights: interpreter, Ray, torch, transformers, KV pool."""

OURS = ("Ingress", "Router", "Directory", "experts")
"""Kinds that are deployments of the application."""

_REPLICA = re.compile(r"ray::ServeReplica:[^:]+:([^:. ]+)")
# The first that is part of the command line names the process.
_OTHERS = {
    "ProxyActor": "proxy",
    "ServeController": "controller",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
    "dashboard": "dashboard",
    "ray::": "Ray workers",
    "deployments.launch": "launch",
    "serve": "serve run",
}


def memory(model: BenchModel, server: Endpoint, whole_bytes: int) -> Iterable[Figure]:
    """The largest process of each kind, and sums against the whole model's weights plus PROCESS_MB a process."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for pid in server.pids():
        try:
            used_mb = pss_bytes(pid) / MB
        except psutil.NoSuchProcess:
            continue
        kinds[kind_of(pid)].append(used_mb)
    for kind, used in sorted(kinds.items(), key=lambda item: -max(item[1])):
        what = f"memory of {kind}" + (f", largest of {len(used)}" if len(used) > 1 else "")
        yield Figure(SIDE, model.name, what, max(used), "MB")
    everything = [used_mb for used in kinds.values() for used_mb in used]
    ours = [used_mb for kind in OURS for used_mb in kinds[kind]]
    for whose, used in (("the application", ours), ("everything", everything)):
        allowed = f"whole model + {PROCESS_MB:.0f} MB a process"
        reference = whole_bytes / MB + PROCESS_MB * len(used)
        what = f"memory of {whose}, {len(used)} processes"
        yield Figure(SIDE, model.name, what, sum(used), "MB", allowed, reference, target=1.0)


def kind_of(pid: int) -> str:
    """What a process does: the name of its deployment, or of its part in Ray; "ended" if it does nothing any more."""
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return "ended"
    replica = _REPLICA.match(command)
    if replica:
        return "experts" if replica[1].startswith("experts-") else replica[1]
    return next((kind for part, kind in _OTHERS.items() if part in command), "others")

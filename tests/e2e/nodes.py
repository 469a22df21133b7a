"""Several Ray nodes on one machine, in a process of their own, until its input ends.

    python -m tests.e2e.nodes '{"l4": {"accelerator_type:L4": 4}}'

starts a head, of the kind "head", and one node for each entry, with the label `kind` and these resources, and prints
the head's address. A line with a kind on its input takes that node away, as a machine goes that loses its power. In a
process of its own because Ray settles at its import whether it asks for tokens; `RAY_AUTH_MODE=token` must be set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.serving import ROOT, free_port

TOKEN = {"RAY_AUTH_MODE": "token"}
STOP_S = 60


@dataclass(frozen=True)
class Nodes:
    """A running cluster. address: of its head."""

    address: str
    _process: subprocess.Popen[str]

    def lose(self, kind: str) -> None:
        """The node of that kind is gone, with all its processes, when this returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kind, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline().strip() == kind


@contextmanager
def nodes(kinds: Mapping[str, Mapping[str, float]], log: Path) -> Iterator[Nodes]:
    """A cluster with a node of each kind, until the block ends."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.nodes", json.dumps(kinds)],
            cwd=ROOT,
            env={**os.environ, **TOKEN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the nodes did not start:\n{log.read_text()[-4000:]}")
        yield Nodes(address, process)
    finally:
        # The end of its input tells it to stop.
        try:
            process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(kinds: Mapping[str, Mapping[str, float]]) -> None:
    """Start, say where, wait for the end of input, stop."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "labels": {"kind": "head"},
            "include_dashboard": True,
            "dashboard_port": free_port(),
        },
    )
    try:
        added = {
            kind: cluster.add_node(num_cpus=4, labels={"kind": kind}, resources=dict(resources))
            for kind, resources in kinds.items()
        }
        print(cluster.address, flush=True)
        for line in sys.stdin:
            node = added.pop(line.strip())
            running = _descendants(node)
            cluster.remove_node(node, allow_graceful=False)
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(running, timeout=STOP_S)
            print(line.strip(), flush=True)
    finally:
        cluster.shutdown()


def _descendants(node: Any) -> list[psutil.Process]:
    """What runs on the node: its agents outlive their raylet."""
    own = [info.process.pid for infos in node.all_processes.values() for info in infos]
    return [child for pid in own for child in psutil.Process(pid).children(recursive=True)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

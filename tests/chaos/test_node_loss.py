"""A node is lost with the replicas on it while streams run: their rows go to other nodes, and nobody sees it.

The cluster is Ray's own double of several nodes on one machine; a lost node's processes are killed, without a word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.running import SILENCE_S, undisturbed
from tests.chaos.streams import Asked, Streams, requests
from tests.e2e.nodes import TOKEN, Nodes, nodes
from tests.serving import ROOT, Server, free_port, launch, serving

GROUPS = 2
KEPT, LOST = "kept", "lost"
STALL_S = 2 * SILENCE_S + 2
"""What a lost router may cost; a lost expert replica costs less."""


@dataclass(frozen=True)
class Served:
    server: Server
    nodes: Nodes
    wanted: dict[Asked, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("nodes")
    config, port = _config(folder), free_port()
    with nodes({KEPT: {}, LOST: {}}, folder / "nodes.log") as cluster:
        environment = {"RAY_ADDRESS": cluster.address, **TOKEN}
        with serving(launch(config, port), port, folder / "log", environment=environment) as server:
            undisturbed(port, requests()[:4])
            yield Served(server, cluster, undisturbed(port, requests())[0])


def _config(folder: Path) -> Path:
    """Every group once on each node, a router wherever there is room, all that clients talk to at the head."""
    document = yaml.safe_load((ROOT / "deployments" / "configs" / "demo.yaml").read_text())
    # The nodes of this double share one address: with a proxy on each, clients would be spread over all of them.
    document["proxy_location"] = "HeadOnly"
    args = document["applications"][0]["args"]
    on = {kind: {"label_selector": {"kind": kind}} for kind in ("head", KEPT, LOST)}
    args["experts"] |= {
        "groups": GROUPS,
        "placement": "contiguous",
        "resources": on[KEPT],
        "pools": {"other": {"resources": on[LOST], "replicas": 1}},
    }
    args["router"] |= {"replicas": 2, "resources": {"label_selector": {"kind": f"in({KEPT},{LOST})"}}}
    args["ingress"] = {"silence_s": SILENCE_S, "resources": on["head"]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_node_is_lost_with_the_replicas_on_it(served: Served, record_property: Any) -> None:
    shown = served.server.get("/v1/cluster")
    by_pool = {each["pool"]: each["node"] for group in shown["groups"] for each in group["replicas"]}
    assert len(set(by_pool.values())) == 2, "each pool has a node of its own"
    streams = Streams(served.server.port, list(served.wanted))
    with streams.running():
        since = time.monotonic()
        served.nodes.lose(LOST)
        assert streams.alive == len(served.wanted), "the streams ended before the node did"
    assert not streams.differences(served.wanted)
    stall_s = streams.stall_s(since)
    record_property("stall node lost s", round(stall_s, 2))
    assert stall_s <= STALL_S

"""From a router's dispatcher over the Directory and HTTP to a placement. About a second; no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch

from cluster.config import ExpertsSpec
from cluster.fabric.local import LocalTransport
from cluster.loads import LoadReport
from cluster.membership import Epoch, View
from cluster.placement import balanced, read_load
from cluster.snapshot import cluster_facts
from deployments.directory_core import DirectoryCore
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.keys import KeyRecord, digest_of
from tests.cluster.fabric import small_experts as small
from tests.deployments.ingress.fakes import FakeCluster, http, make_service, says


class Recorded(FakeCluster):
    """A cluster with a real Directory in it."""

    def __init__(self) -> None:
        super().__init__()
        spec = ExpertsSpec(groups=small.GROUPS)
        facts = cluster_facts("demo", small.DIGEST.hex(), small.PLACEMENT, spec)
        self.directory = DirectoryCore(facts, incarnation="one", clock=lambda: 0.0)

    async def loads(self) -> dict[str, Any]:
        return self.directory.loads()


def sent_by_a_router(seed: int) -> tuple[LoadReport, torch.Tensor]:
    """What a router that holds all experts itself reports after a few layers, and the experts it asked for."""
    groups = {f"experts-{group}": small.expert_group(group, torch.float32) for group in range(small.GROUPS)}
    view = View(Epoch("i", 1), tuple(small.replica(group, "") for group in range(small.GROUPS)))
    dispatcher = small.dispatcher(LocalTransport(groups), view)
    asked = []
    for tokens in (1, 5, 30):
        hidden, index, weight = small.layer_input(tokens, torch.float32, seed=seed + tokens)
        dispatcher.scatter_gather(small.LAYER, hidden, index, weight)
        asked.append(index.flatten())
    return LoadReport(f"router-{seed}", dispatcher.loads(), digest=small.DIGEST.hex()), torch.cat(asked)


def test_loads_over_http_are_a_load_file_that_balances_what_the_routers_sent(tmp_path: Path) -> None:
    async def story() -> bytes:
        cluster = Recorded()
        for report in reports:
            await cluster.directory.report_loads(report)
        auth = Authenticator(None, Keys((KeyRecord("root", digest_of("root")),)))
        async with http(make_service(says("x"), cluster=cluster, auth=auth)) as client:
            assert (await client.get("/v1/cluster/loads")).status_code == 401
            response = await client.get("/v1/cluster/loads", headers={"authorization": "Bearer root"})
        assert response.status_code == 200
        return response.content

    reports, asked = zip(*(sent_by_a_router(seed) for seed in (1, 100)), strict=True)
    path = tmp_path / "loads.json"
    path.write_bytes(asyncio.run(story()))
    load = read_load(path)
    counts = torch.cat(asked).bincount(minlength=small.EXPERTS)
    assert load == {small.LAYER: counts.tolist()}
    assert counts.sum() == 2 * 36 * small.PER_TOKEN
    placement = balanced({small.LAYER: small.EXPERTS}, small.GROUPS, load)
    per_group = torch.zeros(small.GROUPS).index_add_(
        0, torch.tensor(placement.owner[small.LAYER]), counts.to(torch.float32)
    )
    assert per_group.max() - per_group.min() <= counts.max()

"""More load than the cluster can carry: what is accepted stays quick, the rest is told so at once, nothing grows.

One router of eight sequences; two expert groups that wait as a device of 500 rows a second would, so that neither the
model nor the clients are what fills two cores. What the cluster can carry is measured first, in the same run. 95 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
import yaml

from infra.bench.measure import percentile
from tests.chaos.crowd import Crowd, Replies, Reply
from tests.chaos.processes import Processes, footprint
from tests.e2e.conftest import WholeModel
from tests.e2e.load import PROMPTS
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

CONFIG = ROOT / "deployments" / "configs" / "demo.yaml"
SEQUENCES, TOKENS, KV_TOKENS = 8, 32, 1024
LONG, PROMPT_TOKENS, LONG_TOKENS = 5, 130, 120
CLIENTS = 200
LIMIT_S, BURST_S, AFTER_S = 14.0, 15.0, 11.0
SETTLED_S = 4.0
"""From here on a load counts: the first answers of a phase came to an emptier cluster."""
SPREAD_S = 4.0
"""About what a request takes."""
RECOVERED_S = 4.0
REFUSED_S = 0.5
"""A few steps, and the way of a request through proxy and ingress on a busy machine."""
LONGEST_REFUSAL_STEPS = 5
"""Of any refusal, in steps of the cluster at its limit (105 ms): below 1 on a quiet machine."""
RSS_GROWTH = 0.05
"""Of every kind of process, from before the overload until after it, and from twice the limit until ten times."""

Record = Any


@dataclass(frozen=True)
class Cluster:
    """The running server."""

    server: Server
    processes: Processes

    @property
    def crowd(self) -> Crowd:
        """Its clients."""
        return Crowd(self.server.port, PROMPTS["python"], TOKENS)

    def router(self) -> dict[str, Any]:
        """The one router of `/v1/cluster`."""
        [router] = self.server.get("/v1/cluster")["routers"]
        return dict(router)

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or holds pages."""
        router = self.router()
        return not (router["running"] or router["waiting"] or router["kv_used_tokens"])

    def rss_bytes(self) -> dict[str, int]:
        """Of every kind of process that requests go through."""
        kinds = {**self.processes.kinds(), "proxy": self.processes.proxies}
        return {kind: footprint(pids).rss_bytes for kind, pids in kinds.items()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    document = yaml.safe_load(CONFIG.read_text())
    [application] = document["applications"]
    application["args"]["experts"] = {"groups": 2, "placement": "contiguous", "emulate": {"rows_per_s": 500}}
    application["args"]["router"] = {"max_sequences": SEQUENCES, "max_batch_tokens": 512, "kv_tokens": KV_TOKENS}
    folder = tmp_path_factory.mktemp("overload")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document, allow_unicode=True))
    port = free_port()
    with serving(launch(config, port), port, folder / "log") as server:
        yield Cluster(server, Processes(psutil.Process(server.process.pid), application["name"]))


@pytest.mark.timeout(400)
def test_overload_is_refused_at_once_and_what_is_accepted_stays_quick(
    cluster: Cluster, record_property: Record
) -> None:
    crowd = cluster.crowd
    crowd.closed(SEQUENCES, 1.0, 0.5)  # warm-up
    limit = crowd.closed(SEQUENCES, LIMIT_S, SPREAD_S)
    assert not limit.refused
    assert not limit.broken
    bursts: dict[int, Replies] = {}
    rss = {1: cluster.rss_bytes()}
    for times in (2, 10):
        bursts[times] = crowd.at_rate(times * limit.rate(SETTLED_S), CLIENTS, BURST_S)
        rss[times] = cluster.rss_bytes()
    after = crowd.closed(SEQUENCES, AFTER_S, SPREAD_S)
    for times, burst in bursts.items():
        assert burst.refused, "queues have bounds"
        for name, value in _figures(burst, limit).items():
            record_property(f"{times}x {name}", value)
    growth = {kind: tuple(round(rss[10][kind] / rss[times][kind] - 1, 3) for times in (1, 2)) for kind in rss[1]}
    record_property(
        "limit", (round(limit.rate(SETTLED_S), 2), round(limit.latency_s(0.5), 2), round(limit.latency_s(0.95), 2))
    )
    record_property("rss growth since before, since 2x", growth)
    record_property("rate after", round(after.rate(RECOVERED_S) / limit.rate(SETTLED_S), 2))
    for burst in bursts.values():
        _check(burst, limit)
    assert len(bursts[10].all) >= 0.8 * 10 * limit.rate(SETTLED_S) * BURST_S, "the load was there"
    assert max(map(max, growth.values())) < RSS_GROWTH
    assert after.rate(RECOVERED_S) >= 0.8 * limit.rate(SETTLED_S)
    assert not after.broken
    wait_for(cluster.is_idle, 10, "nothing left in the engine")


def _figures(burst: Replies, limit: Replies) -> dict[str, Any]:
    refusals = [reply.took_s for reply in burst.refused]
    return {
        "asked, served, refused": (len(burst.all), len(burst.served), len(burst.refused)),
        "rate of the limit's": round(burst.rate(SETTLED_S) / limit.rate(SETTLED_S), 2),
        "p50, p95 of the limit's": tuple(
            round(burst.latency_s(share, SETTLED_S) / limit.latency_s(share, SETTLED_S), 2) for share in (0.5, 0.95)
        ),
        "refusal p50, p95, longest ms": tuple(round(1e3 * percentile(refusals, share)) for share in (0.5, 0.95, 1)),
        "refusal longest steps": round(max(refusals) / _step_s(limit), 1),
        "retry after": sorted({reply.retry_after for reply in burst.refused}),
    }


def _step_s(limit: Replies) -> float:
    """A step of the cluster at its limit: every step gives each sequence one token."""
    return limit.latency_s(0.5, SETTLED_S) / TOKENS


def _check(burst: Replies, limit: Replies) -> None:
    assert not burst.broken, burst.broken[:3]
    assert all(int(reply.retry_after) >= 1 for reply in burst.refused)
    assert all(reply.tokens == TOKENS for reply in burst.served)
    refusals = [reply.took_s for reply in burst.refused]
    assert percentile(refusals, 0.95) <= REFUSED_S
    assert max(refusals) <= LONGEST_REFUSAL_STEPS * _step_s(limit)
    for share in (0.5, 0.95):
        assert burst.latency_s(share, SETTLED_S) <= 2 * limit.latency_s(share, SETTLED_S)
    assert burst.rate(SETTLED_S) >= 0.75 * limit.rate(SETTLED_S), "refusing takes no capacity from the others"


def _prompt(model: WholeModel, number: int) -> str:
    """PROMPT_TOKENS or a few less, each another one from its first word on."""
    text = f"# {number}\n" + "".join(PROMPTS["python"]) * 3
    while len(model.tokenizer(text)["input_ids"]) > PROMPT_TOKENS:
        text = text[:-1]
    return text


def test_a_pool_too_small_for_all_makes_some_wait_and_nobody_fail(
    cluster: Cluster, whole_model: WholeModel, record_property: Record
) -> None:
    """Five prompts fit, with their answers they do not: some give up their pages, and are computed again."""
    prompts = [_prompt(whole_model, number) for number in range(LONG)]
    assert LONG * (PROMPT_TOKENS - 3 + LONG_TOKENS) > 1.2 * KV_TOKENS
    crowd = Crowd(cluster.server.port, tuple(prompts), LONG_TOKENS)

    async def all_at_once() -> tuple[list[Reply], int]:
        async with httpx.AsyncClient(timeout=60) as http:
            asked = asyncio.gather(*(crowd.ask(http, prompt) for prompt in prompts))
            most = 0
            while not asked.done():
                most = max(most, (await asyncio.to_thread(cluster.router))["waiting"])
                await asyncio.sleep(0.2)
            return await asked, most

    before = cluster.router()["preemptions"]
    replies, most_waiting = asyncio.run(all_at_once())
    record_property("most waiting", most_waiting)
    assert [reply.status for reply in replies] == [200] * len(prompts)
    assert most_waiting >= 1, "there are slots for all: whoever waited had lost its pages"
    preempted = wait_for(lambda: cluster.router()["preemptions"] - before, 5, "preemptions in /v1/cluster")
    record_property("preemptions", preempted)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.text == whole_model.continued(prompt, LONG_TOKENS)
    wait_for(cluster.is_idle, 10, "nothing left in the engine")

"""Probes share one question to the Directory, never an answer meant for somebody else. Milliseconds."""

from __future__ import annotations

import asyncio
import contextvars
from pathlib import Path
from typing import Any

import pytest

from deployments.ingress.auth import Authenticator, KeyFile
from deployments.ingress.clients import Health
from deployments.ingress.keys import KeyRecord, digest_of
from deployments.ingress.shared_health import SHARED_S, SharedHealth
from tests.deployments.ingress.fakes import FakeCluster, http, make_service, says

BROKEN = Health(("experts-2",), reasons={"experts-2": "a shard is missing"})


class Counted(FakeCluster):
    """Counts who asks; answers only once `answer` is set."""

    def __init__(self, health: Health | Exception) -> None:
        super().__init__(health)
        self.asked = 0
        self.answer = asyncio.Event()

    async def health(self) -> Health:
        self.asked += 1
        await self.answer.wait()
        return await super().health()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_storm_of_probes_asks_once_and_each_is_told_what_it_may_know(tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(KeyRecord("admin", digest_of("admin-key")).line())

    async def story() -> None:
        cluster = Counted(BROKEN)
        auth = Authenticator(None, KeyFile(tmp_path / "admin"))
        async with http(make_service(says("x"), cluster=cluster, auth=auth)) as client:

            async def probe(key: str) -> Any:
                answer = await client.get("/health", headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == 503
                return answer.json().get("reasons")

            keys = ["admin-key", "other-key"] * 50
            probes = [asyncio.create_task(probe(key)) for key in keys]
            for _ in range(50):
                await asyncio.sleep(0)
            cluster.answer.set()
            told = await asyncio.gather(*probes)
            assert told == [dict(BROKEN.reasons) if key == "admin-key" else None for key in keys]
            # And those who come a moment later, one after the other.
            assert [await probe(key) for key in keys[:2]] == [dict(BROKEN.reasons), None]
        assert cluster.asked == 1

    asyncio.run(story())


@pytest.mark.parametrize("health", [BROKEN, RuntimeError("gone")])
def test_an_answer_is_shared_for_its_time_and_then_asked_for_anew(health: Health | Exception) -> None:
    async def story() -> None:
        cluster, clock = Counted(health), Clock()
        cluster.answer.set()
        shared = SharedHealth(cluster, clock)
        wanted = health if isinstance(health, Health) else None
        for asked in (1, 2, 3):
            assert await shared() == wanted
            clock.now += SHARED_S * 0.9
            assert await shared() == wanted
            assert cluster.asked == asked
            clock.now += SHARED_S * 0.2

    asyncio.run(story())


def test_a_probe_that_gives_up_leaves_the_others_their_answer_and_a_slow_question_is_not_repeated() -> None:
    async def story() -> None:
        cluster, clock = Counted(Health()), Clock()
        shared = SharedHealth(cluster, clock)
        first, second = asyncio.create_task(shared()), asyncio.create_task(shared())
        await asyncio.sleep(0)
        clock.now += 10 * SHARED_S
        third = asyncio.create_task(shared())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        cluster.answer.set()
        assert list(await asyncio.gather(second, third)) == [Health(), Health()]
        assert first.cancelled()
        assert cluster.asked == 1

    asyncio.run(story())


def test_the_question_belongs_to_none_of_the_probes() -> None:
    """Serve cancels what a request has called when its client goes; it finds the request in the context."""
    probing: contextvars.ContextVar[str] = contextvars.ContextVar("probing", default="")
    seen: list[str] = []

    class Asked(FakeCluster):
        async def health(self) -> Health:
            seen.append(probing.get())
            return await super().health()

    async def story() -> None:
        probing.set("the first probe")
        assert await SharedHealth(Asked(BROKEN))() == BROKEN

    asyncio.run(story())
    assert seen == [""]

"""The live picture over HTTP and by itself: one sampler for all, newest events only, an end to every stream. A second.

Periods are hundredths of a second here; nothing waits for a whole one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.errors import DirectoryUnavailableError, OverloadedError
from deployments.ingress import live as module
from deployments.ingress.auth import Authenticator, Keys
from deployments.ingress.clients import Health
from deployments.ingress.keys import KeyRecord, digest_of
from deployments.ingress.live import Live
from tests.deployments.ingress.fakes import http, make_service, says

PERIOD_S = 0.01


class Cluster:
    """Counts who asks. away: nobody answers. hang: an answer never comes."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = self.hang = False

    async def health(self) -> Health:
        return Health()

    async def snapshot(self) -> dict[str, Any]:
        self.asked += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.away:
            raise DirectoryUnavailableError("The directory does not answer.")
        router = {"id": "r", "running": 1, "waiting": 0, "tokens_generated": self.asked}
        return {"groups": [{"name": "experts-0", "experts": {"1": [0, 1]}}], "routers": [router], "decisions": []}

    async def loads(self) -> dict[str, Any]:
        return {"layers": [1], "domains": {"recorded": [[self.asked, 0]]}}


@asynccontextmanager
async def watching(live: Live) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
    live.enter()
    events = live.events()
    try:
        yield events
    finally:
        await live.leave()
        await events.aclose()


async def read(events: AsyncGenerator[bytes, None]) -> tuple[int, dict[str, Any]]:
    """The next event's id and data."""
    async with asyncio.timeout(5):
        event = await anext(events)
    if event == module.RETRY:
        return await read(events)
    first, second = event.decode().removesuffix("\n\n").split("\n")
    return int(first.removeprefix("id: ")), json.loads(second.removeprefix("data: "))


def test_events_have_the_agreed_keys_and_rising_ids() -> None:
    async def story() -> None:
        async with watching(Live(Cluster(), period_s=PERIOD_S)) as events:
            assert await anext(events) == b"retry: 1000\n\n"
            seen = [await read(events) for _ in range(3)]
        assert [number for number, _ in seen] == sorted({number for number, _ in seen})
        first, last = seen[0][1], seen[-1][1]
        assert first.keys() == {"time", "cluster", "health", "rates", "heat"}
        assert first["cluster"]["groups"][0]["name"] == "experts-0"
        assert first["health"] == {"status": "ok", "missing": [], "reasons": {}}
        assert first["rates"]["tokens_per_s"] is None, "one sample is no rate"
        assert last["rates"]["tokens_per_s"] > 0
        assert last["heat"]["rows_per_s"][0][0] > 0
        assert last["heat"]["group"] == [[0, 0]]

    asyncio.run(story())


def test_one_sampler_serves_all_viewers_and_ends_with_the_last() -> None:
    async def story() -> None:
        cluster = Cluster()
        live = Live(cluster, period_s=PERIOD_S)
        async with watching(live) as one, watching(live) as two:
            for _ in range(3):
                await asyncio.gather(read(one), read(two))
            assert cluster.asked <= 5, "two samplers would have asked twice as often"
        assert live.viewers == 0
        asked = cluster.asked
        assert len(asyncio.all_tasks()) == 1, "somebody still samples for nobody"
        async with watching(live) as events:
            await read(events)
        assert cluster.asked > asked

    asyncio.run(story())


def test_who_comes_while_the_last_viewer_leaves_gets_events() -> None:
    """A page that is reloaded: its old stream ends while the new one begins."""

    async def story() -> None:
        live = Live(Cluster(), period_s=PERIOD_S)
        live.enter()
        first = live.events()
        await read(first)
        leaving = asyncio.create_task(live.leave())
        await asyncio.sleep(0)
        async with watching(live) as second:
            await leaving
            await read(second)
            await read(second)
        await first.aclose()

    asyncio.run(story())


def test_a_slow_viewer_gets_the_newest_event_and_not_those_it_missed() -> None:
    async def story() -> None:
        live = Live(Cluster(), period_s=PERIOD_S)
        async with watching(live) as slow, watching(live) as quick:
            before, _ = await read(slow)
            for _ in range(5):
                newest, _ = await read(quick)
            number, _ = await read(slow)
            assert number >= newest > before

    asyncio.run(story())


def test_too_many_viewers_are_refused_and_a_place_given_back_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VIEWERS", 2)

    async def story() -> None:
        live = Live(Cluster(), period_s=PERIOD_S)
        async with watching(live):
            async with watching(live):
                with pytest.raises(OverloadedError):
                    live.enter()
            live.enter()
            await live.leave()

    asyncio.run(story())


@pytest.mark.parametrize("trouble", ["away", "hang"])
def test_while_the_directory_is_away_events_show_what_is_known_and_say_so(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_S", 0.05)

    async def story() -> None:
        cluster = Cluster()
        async with watching(Live(cluster, period_s=PERIOD_S)) as events:
            await read(events)
            setattr(cluster, trouble, True)
            async with asyncio.timeout(5):
                while (event := (await read(events))[1])["health"]["status"] == "ok":
                    pass
            assert event["health"]["missing"] == ["directory"]
            assert event["cluster"]["groups"][0]["name"] == "experts-0"
            assert set(event["rates"].values()) == {None}
            if trouble == "away":
                cluster.away = False
                async with asyncio.timeout(5):
                    while (await read(events))[1]["health"]["status"] != "ok":
                        pass

    asyncio.run(story())


def test_a_cluster_that_never_answered_is_shown_as_unknown() -> None:
    async def story() -> None:
        cluster = Cluster()
        cluster.away = True
        async with watching(Live(cluster, period_s=PERIOD_S)) as events:
            _, event = await read(events)
        assert event["cluster"] is None
        assert event["health"]["missing"] == ["directory"]
        assert event["heat"] == {"layers": [], "experts": 0, "rows_per_s": [], "group": []}

    asyncio.run(story())


def test_streams_end_by_themselves_when_the_replica_is_told_to_stop() -> None:
    async def story() -> None:
        leaving = False

        async def asked() -> bool:
            return leaving

        async with watching(Live(Cluster(), leaving=asked, period_s=PERIOD_S)) as events:
            await read(events)
            leaving = True
            async with asyncio.timeout(5):
                rest = [event async for event in events]
        assert len(rest) <= 2

    asyncio.run(story())


def test_a_stream_ends_after_its_longest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_S", 3 * PERIOD_S)

    async def story() -> None:
        async with watching(Live(Cluster(), period_s=PERIOD_S)) as events, asyncio.timeout(5):
            assert len([event async for event in events]) >= 2

    asyncio.run(story())


def test_events_need_the_admin_key_where_there_are_keys() -> None:
    async def story() -> None:
        keys = Authenticator(Keys((KeyRecord("u", digest_of("u")),)), Keys((KeyRecord("a", digest_of("a")),)))
        async with http(make_service(says("x"), auth=keys)) as client:
            for key in ("", "u", "x"):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                assert (await client.get("/dashboard/events", headers=headers)).status_code == 401

    asyncio.run(story())


def test_over_http_a_viewer_reads_server_sent_events_until_the_replica_stops() -> None:
    async def story() -> None:
        asked = 0

        async def leaving() -> bool:
            nonlocal asked
            asked += 1
            return asked > 1

        async with http(make_service(says("x"), cluster=Cluster(), leaving=leaving)) as client:
            response = await client.get("/dashboard/events", timeout=10)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-transform" in response.headers["cache-control"]
        assert response.text.startswith("retry: 1000\n\nid: ")

    asyncio.run(story())

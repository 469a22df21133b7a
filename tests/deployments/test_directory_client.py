"""Clients of the Directory against the real core behind a fake handle that can be down. About a second."""

import asyncio
import contextvars
import threading
from dataclasses import replace

import numpy as np
import pytest

from cluster.config import ExpertsSpec
from cluster.decisions import PolicyReport
from cluster.errors import DirectoryUnavailableError
from cluster.loads import LoadReport
from cluster.membership import Address, Replica, State
from cluster.placement import contiguous
from cluster.snapshot import cluster_facts
from cluster.stats import ReplicaStats, RouterStats, StartFailure
from deployments import directory_client
from deployments.directory_client import ClusterReader, Registration, RouterLink, call, watch
from deployments.directory_core import DirectoryCore

GROUPS = ("experts-0",)
DIGEST = "ab" * 32
FACTS = cluster_facts("demo", DIGEST, contiguous({0: 2}, 1), ExpertsSpec(groups=1))
REPLICA = Replica("a", "experts-0", "default", Address("node", "socket", "127.0.0.1", 7000), "ab" * 32, 100.0)
READY = Replica(**{**vars(REPLICA), "state": State.READY})
SOON_S = 0.005


class Directory(DirectoryCore):
    """The core, with the signatures of the deployment."""

    def __init__(self, incarnation="one"):
        super().__init__(FACTS, incarnation=incarnation, clock=asyncio.get_running_loop().time)

    async def health(self):
        return *super().health(), super().reasons()

    async def degraded(self):
        return super().degraded()

    async def snapshot(self, targets):
        return super().snapshot(targets)

    async def loads(self):
        return super().loads()


class Handle:
    """What a Serve handle does: `handle.method.remote(...)` starts the call and can be awaited, or fails."""

    def __init__(self, directory):
        self.directory = directory
        self.calls = []

    def __getattr__(self, name):
        return Method(self, name)


class Method:
    def __init__(self, handle, name):
        self._handle, self._name = handle, name

    async def remote(self, *arguments):
        self._handle.calls.append((self._name, *arguments))
        if self._handle.directory is None:
            await asyncio.sleep(0)
            raise ConnectionError("the directory is down")
        return await getattr(self._handle.directory, self._name)(*arguments)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def end(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_watcher_sees_each_change_once():
    async def story():
        handle, seen = Handle(Directory()), []
        task = asyncio.create_task(watch(handle, seen.append, GROUPS, digest=DIGEST, poll_s=SOON_S))
        await until(lambda: len(seen) == 1)
        await handle.directory.report(READY, ReplicaStats())
        await until(lambda: len(seen) == 2)
        await until(lambda: len(handle.calls) > 5)
        await end(task)
        assert [view.replicas for view in seen] == [(), (READY,)]

    asyncio.run(story())


def test_a_watcher_sees_no_replica_of_another_model_and_does_not_wait_for_one_either():
    async def story():
        handle, seen = Handle(Directory("one")), []
        await handle.directory.report(replace(READY, id="other", digest="cd" * 32), ReplicaStats())
        task = asyncio.create_task(watch(handle, seen.append, GROUPS, digest=DIGEST, poll_s=SOON_S, patience_s=60))
        await until(lambda: seen)
        handle.directory = Directory("two")
        await until(lambda: len(seen) == 2)  # at once: to this router the old view had nobody either
        await end(task)
        assert [view.replicas for view in seen] == [(), ()]

    asyncio.run(story())


def test_a_watcher_keeps_its_view_through_a_restart_until_the_new_directory_has_caught_up():
    async def story():
        handle, seen = Handle(Directory("one")), []
        await handle.directory.report(READY, ReplicaStats())
        task = asyncio.create_task(watch(handle, seen.append, GROUPS, digest=DIGEST, poll_s=SOON_S, patience_s=60))
        await until(lambda: seen)
        handle.directory = None
        down_from = len(handle.calls)
        await until(lambda: len(handle.calls) >= down_from + 2)
        handle.directory = Directory("two")
        up_from = len(handle.calls)
        await until(lambda: len(handle.calls) >= up_from + 3)
        assert [view.epoch.incarnation for view in seen] == ["one"]
        await handle.directory.report(READY, ReplicaStats())
        await until(lambda: len(seen) == 2)
        await end(task)
        assert (seen[1].epoch.incarnation, seen[1].replicas) == ("two", (READY,))

    asyncio.run(story())


def test_a_watcher_believes_a_directory_that_stays_empty_when_its_patience_ends():
    async def story():
        handle, seen = Handle(Directory("one")), []
        await handle.directory.report(READY, ReplicaStats())
        task = asyncio.create_task(watch(handle, seen.append, GROUPS, digest=DIGEST, poll_s=60, patience_s=0.05))
        await until(lambda: seen)
        old, handle.directory = handle.directory, Directory("two")
        await old.leave("a")  # ends the open poll; the next one goes to the new directory
        await until(lambda: len(seen) == 3)
        await end(task)
        assert [(view.epoch.incarnation, len(view.replicas)) for view in seen] == [("one", 1), ("one", 0), ("two", 0)]

    asyncio.run(story())


def test_a_view_that_could_not_be_used_is_offered_again():
    async def story():
        handle, seen = Handle(Directory()), []

        def on_view(view):
            seen.append(view)
            if len(seen) == 1:
                raise RuntimeError("not yet")

        task = asyncio.create_task(watch(handle, on_view, GROUPS, digest=DIGEST, poll_s=60))
        await until(lambda: len(seen) == 2)
        await end(task)

    asyncio.run(story())


def test_a_registration_reports_until_it_leaves_and_survives_outages():
    async def story():
        directory = Directory()
        handle, rows = Handle(directory), iter(range(1_000_000))
        registration = Registration(
            handle,
            REPLICA,
            lambda: ReplicaStats(rows=next(rows)),
            on_refused=lambda: pytest.fail("refused"),
            period_s=SOON_S,
        )
        registration.start()
        registration.start()
        await until(lambda: len(handle.calls) >= 2)
        assert (await directory.view(None, 0)).replicas == (REPLICA,)
        handle.directory = None
        await registration.update(READY)
        handle.directory = directory
        await until(lambda: directory._membership.view().replicas == (READY,))
        draining = Replica(**{**vars(READY), "state": State.DRAINING})
        await registration.update(draining)
        assert (await directory.view(None, 0)).replicas == (draining,)
        await registration.leave()
        await registration.leave()
        assert (await directory.view(None, 0)).replicas == ()
        assert [name for name, *_ in handle.calls].count("leave") == 1
        calls = len(handle.calls)
        await registration.update(READY)
        registration.start()
        await asyncio.sleep(3 * SOON_S)
        assert len(handle.calls) == calls

    asyncio.run(story())


def test_a_registration_that_cannot_say_goodbye_ends_anyway():
    async def story():
        registration = Registration(Handle(None), REPLICA, ReplicaStats, on_refused=lambda: pytest.fail("refused"))
        registration.start()
        await registration.leave()

    asyncio.run(story())


def test_a_refused_replica_is_told_once_and_reports_no_more():
    async def story():
        handle, refused = Handle(Directory()), []
        await handle.directory.leave("a")
        registration = Registration(
            handle, READY, ReplicaStats, on_refused=lambda: refused.append(True), period_s=SOON_S
        )
        registration.start()
        await until(lambda: refused)
        calls = len(handle.calls)
        await asyncio.sleep(3 * SOON_S)
        await registration.leave()
        assert (len(handle.calls), refused) == (calls, [True])

    asyncio.run(story())


class Rows:
    """What a router has sent to the two experts of layer 0 so far."""

    def __init__(self):
        self.now = np.zeros(2, dtype=np.int64)

    def send(self, *rows):
        self.now = self.now + np.array(rows)

    def report(self):
        return LoadReport("r", {0: self.now}, digest=DIGEST)


def router_link(handle, on_view=lambda _: None, rows=None):
    return RouterLink(
        handle,
        GROUPS,
        digest=DIGEST,
        on_view=on_view,
        stats=lambda: RouterStats("r", running=1),
        loads=(rows or Rows()).report,
        period_s=SOON_S,
        loads_period_s=SOON_S,
    )


def test_a_router_says_how_long_ago_it_heard_from_the_directory_while_it_can_say_anything():
    async def story():
        class Deaf(Directory):
            async def view(self, _known, _timeout_s):
                await asyncio.sleep(3600)

        link = router_link(Handle(deaf := Deaf()))
        link.start()
        await until(lambda: deaf._live_routers())
        heard = deaf._live_routers()[0].view_age_s
        await until(lambda: deaf._live_routers()[0].view_age_s > heard)
        await link.stop()

    asyncio.run(story())


async def recorded(directory):
    [[rows]] = (await directory.loads())["domains"].values()
    return rows


def test_a_router_tells_its_loads_again_and_again_and_a_last_time_when_it_stops():
    async def story():
        directory, rows = Directory(), Rows()
        handle = Handle(directory)
        link = router_link(handle, rows=rows)
        link.start()
        rows.send(3, 1)
        await until(lambda: directory._loads._by_router and directory._loads._by_router["r"][0].tolist() == [3, 1])
        rows.send(0, 2)
        await link.stop()
        assert await recorded(directory) == [3, 3]
        rows.send(5, 5)
        await link.stop()
        assert await recorded(directory) == [3, 3]
        assert [call[1].last for call in handle.calls if call[0] == "report_loads"][-2:] == [False, True]

    asyncio.run(story())


def test_loads_are_told_soon_where_rows_have_come_and_seldom_where_none_have(monkeypatch):
    monkeypatch.setattr(directory_client, "CHANGED_LOADS_PERIOD_S", SOON_S)

    class Counted(Rows):
        asked = 0

        def report(self):
            self.asked += 1
            return super().report()

    async def story():
        handle, rows = Handle(Directory()), Counted()
        link = RouterLink(
            handle,
            GROUPS,
            digest=DIGEST,
            on_view=lambda _: None,
            stats=lambda: RouterStats("r"),
            loads=rows.report,
            period_s=SOON_S,
            loads_period_s=1000.0,
        )

        def told():
            return [call[1].rows[0].tolist() for call in handle.calls if call[0] == "report_loads"]

        link.start()
        await until(lambda: rows.asked >= 5)
        assert told() == [[0, 0]]
        rows.send(3, 1)
        await until(lambda: len(told()) == 2)
        asked = rows.asked
        await until(lambda: rows.asked >= asked + 4)
        assert told() == [[0, 0], [3, 1]]
        await link.stop()

    asyncio.run(story())


def test_loads_that_a_directory_did_not_hear_are_told_to_it_or_to_the_next_once():
    async def story():
        directory, rows = Directory(), Rows()
        handle = Handle(directory)
        link = router_link(handle, rows=rows)
        link.start()
        rows.send(3, 1)
        await until(lambda: any(call[0] == "report_loads" and call[1].rows[0].any() for call in handle.calls))
        handle.directory, calls = None, len(handle.calls)
        rows.send(10, 0)
        await until(lambda: [call[0] for call in handle.calls[calls:]].count("report_loads") >= 2)
        handle.directory = directory
        await until(lambda: directory._loads._by_router["r"][0].tolist() == [13, 1])
        handle.directory = restarted = Directory("two")
        await until(lambda: restarted._loads._by_router)
        await link.stop()
        assert await recorded(restarted) == await recorded(directory) == [13, 1]

    asyncio.run(story())


def test_a_last_word_that_is_not_heard_is_said_again_by_the_next_stop_and_never_without_a_start():
    async def story():
        directory, rows = Directory(), Rows()
        handle = Handle(None)
        await router_link(handle).stop()
        assert handle.calls == []
        link = router_link(handle, rows=rows)
        link.start()
        rows.send(1, 0)
        await link.stop()
        handle.directory = directory
        await link.stop()
        assert await recorded(directory) == [1, 0]

    asyncio.run(story())


def test_a_router_watches_reports_and_complains_from_any_thread():
    async def story():
        directory, seen = Directory(), []
        handle = Handle(directory)
        await directory.report(READY, ReplicaStats())
        link = router_link(handle, on_view=seen.append)
        link.lost("a")  # before the start there is nobody to tell
        link.start()
        link.start()
        await until(lambda: seen and directory._routers)
        thread = threading.Thread(target=lambda: [link.lost("a") for _ in range(5)])
        thread.start()
        await until(lambda: ("lost", "a", "r") in handle.calls)
        thread.join()
        assert await directory.health() == (True, [], {})
        assert (directory._routers["r"][1].digest, directory._routers["r"][1].groups) == (DIGEST, GROUPS)
        await link.stop()
        await link.stop()
        calls = len(handle.calls)
        await asyncio.sleep(3 * SOON_S)
        assert len(handle.calls) == calls
        return link

    asyncio.run(story()).lost("a")  # after the loop has ended there is nobody to tell


def test_a_router_s_view_is_as_old_as_the_directory_s_last_answer():
    async def story():
        directory = Directory()
        await directory.report(READY, ReplicaStats())
        handle, now = Handle(None), [100.0]
        link = RouterLink(
            handle,
            GROUPS,
            digest=DIGEST,
            on_view=lambda _: None,
            stats=lambda: RouterStats("r"),
            loads=Rows().report,
            clock=lambda: now[0],
        )
        link.start()
        now[0] = 107.0
        await until(lambda: any(name == "view" for name, *_ in handle.calls))
        assert link.view_age_s == 7.0, "never heard since the start"
        handle.directory = directory
        await until(lambda: link.view_age_s == 0.0)
        now[0] = 110.0
        assert link.view_age_s == 3.0
        await link.stop()

    asyncio.run(story())


def test_the_ingress_reads_health_and_snapshot_with_the_targets():
    async def story():
        async def targets():
            return {"experts-0": 4}

        handle = Handle(Directory())
        await handle.directory.report_failure(StartFailure(1.0, "experts-0", "experts-0", "no disk"))
        reader = ClusterReader(handle, targets)
        assert await reader.health() == (False, ["router", "experts-0"], {"experts-0": "no disk"})
        assert await reader.degraded() == {}
        await handle.directory.report_policy(PolicyReport("p.yaml", failure="x"))
        assert list(await reader.degraded()) == ["policy"]
        assert (await reader.snapshot())["groups"][0]["target_replicas"] == 4
        assert await reader.loads() == {"layers": [0], "domains": {"recorded": [[0, 0]]}}
        handle.directory = None
        assert await reader.health() == (False, ["directory"], {})
        assert await reader.degraded() == {}
        with pytest.raises(DirectoryUnavailableError):
            await reader.snapshot()
        with pytest.raises(DirectoryUnavailableError):
            await reader.loads()

    asyncio.run(story())


def test_a_call_that_takes_too_long_is_cancelled():
    class Response:
        cancelled = 0

        def __await__(self):
            return asyncio.sleep(60).__await__()

        def cancel(self):
            self.cancelled += 1

    async def story():
        response = Response()
        with pytest.raises(TimeoutError):
            await call(response, 0.001)
        assert response.cancelled == 1

    asyncio.run(story())


def test_background_work_does_not_pass_for_a_part_of_the_request_that_started_it():
    request = contextvars.ContextVar("request", default="none")

    class Asking(Handle):
        def __getattr__(self, name):
            seen.append(request.get())
            return super().__getattr__(name)

    seen = []

    async def story():
        request.set("a request")
        registration = Registration(Asking(Directory()), READY, ReplicaStats, on_refused=lambda: None)
        registration.start()
        await until(lambda: seen)
        await registration.leave()
        assert seen[0] == "none"

    asyncio.run(story())

"""The Directory without Ray: long polls, heartbeats, expiry. Well under a second; time is a list with one number."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from cluster.config import ExpertsSpec
from cluster.decisions import PolicyReport
from cluster.health_reasons import POLICY_SILENCE_S, ROUTER_SILENCE_TOLD_S, STALE_VIEW_S
from cluster.loads import LoadReport
from cluster.membership import Address, Epoch, Replica, State
from cluster.placement import contiguous
from cluster.snapshot import cluster_facts
from cluster.stats import ReplicaStats, RouterStats, StartFailure
from deployments.directory_core import FOLD_AFTER_S, KEPT_FAILURES, ROUTER_TIMEOUT_S, DirectoryCore

HERE = Address("node", "socket", "127.0.0.1", 7000)
FACTS = cluster_facts("demo", "ab" * 32, contiguous({0: 4}, 2), ExpertsSpec(groups=2))
LONG_S = 3600.0
DIGEST = "ab" * 32


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def core(clock):
    return DirectoryCore(FACTS, incarnation="one", clock=lambda: clock[0])


def replica(replica_id="a", group="experts-0", state=State.READY):
    return Replica(replica_id, group, "default", HERE, "ab" * 32, 100.0, state)


def test_a_view_the_caller_does_not_know_is_answered_at_once(core):
    async def story():
        await core.report(replica(), ReplicaStats())
        for known in (None, Epoch("one", 0), Epoch("other", 1)):
            assert (await core.view(known, LONG_S)).replicas == (replica(),)

    asyncio.run(story())


def test_a_known_view_is_answered_when_something_changes(core):
    async def story():
        first = await core.view(None, LONG_S)
        polls = [asyncio.create_task(core.view(first.epoch, LONG_S)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(poll.done() for poll in polls)
        await core.report(replica(), ReplicaStats())
        views = await asyncio.gather(*polls)
        assert {view.epoch for view in views} == {Epoch("one", 1)}

    asyncio.run(story())


def test_a_heartbeat_that_says_nothing_new_wakes_nobody(core):
    async def story():
        await core.report(replica(), ReplicaStats())
        poll = asyncio.create_task(core.view(Epoch("one", 1), LONG_S))
        await asyncio.sleep(0)
        await core.report(replica(), ReplicaStats(rows=5))
        await asyncio.sleep(0)
        assert not poll.done()
        await core.leave("a")
        assert (await poll).replicas == ()

    asyncio.run(story())


@pytest.mark.parametrize("timeout_s", [0.01, 0.0])
def test_a_poll_ends_with_the_same_view_when_its_time_is_up(core, timeout_s):
    assert asyncio.run(core.view(Epoch("one", 0), timeout_s)).epoch == Epoch("one", 0)


def test_a_poller_that_gives_up_leaves_no_trace(core):
    async def story():
        poll = asyncio.create_task(core.view(Epoch("one", 0), LONG_S))
        await asyncio.sleep(0)
        poll.cancel()
        with pytest.raises(asyncio.CancelledError):
            await poll
        assert await core.report(replica(), ReplicaStats())

    asyncio.run(story())


def test_a_silent_replica_is_taken_out_and_may_come_back(core, clock):
    async def story():
        await core.report(replica(), ReplicaStats())
        clock[0] = 10.5
        poll = asyncio.create_task(core.view(Epoch("one", 1), LONG_S))
        await asyncio.sleep(0)
        await core.expire()
        assert (await poll).replicas == ()
        assert await core.report(replica(), ReplicaStats())

    asyncio.run(story())


def test_a_replica_that_left_is_refused(core):
    async def story():
        await core.report(replica(), ReplicaStats())
        await core.leave("a")
        await core.leave("a")
        assert not await core.report(replica(), ReplicaStats())
        assert (await core.view(None, 0)).replicas == ()

    asyncio.run(story())


def test_a_lost_replica_is_taken_out_early_only_if_it_is_silent_too(core, clock):
    async def story():
        await core.report(replica("dead"), ReplicaStats())
        await core.report(replica("alive"), ReplicaStats())
        clock[0] = 2.5
        await core.report(replica("alive"), ReplicaStats())
        for replica_id in ("dead", "alive", "alive", "unknown"):
            await core.lost(replica_id, by="router")
        assert len((await core.view(None, 0)).replicas) == 2
        await core.lost("dead", by="router")
        assert [member.id for member in (await core.view(None, 0)).replicas] == ["alive"]

    asyncio.run(story())


def test_health_follows_replicas_and_routers(core, clock):
    async def story():
        assert core.health() == (False, ["router", "experts-0", "experts-1"])
        await core.report_router(RouterStats("r"))
        await core.report(replica("a"), ReplicaStats())
        await core.report(replica("b", "experts-1", State.JOINING), ReplicaStats())
        assert core.health() == (False, ["experts-1"])
        await core.report(replica("b", "experts-1"), ReplicaStats())
        assert core.health() == (True, [])
        clock[0] += ROUTER_TIMEOUT_S + 0.1
        await core.expire()
        assert core.health() == (False, ["router"])

    asyncio.run(story())


def test_the_snapshot_shows_the_last_report_of_each(core):
    async def story():
        await core.report(replica(), ReplicaStats(rows=1))
        await core.report(replica(), ReplicaStats(rows=2, utilization=0.5))
        await core.report_router(RouterStats("r", running=1))
        await core.report_router(RouterStats("r", running=2, critical_share={"experts-0": 0.25}))
        shown = core.snapshot({"experts-0": 5})
        (first,) = shown["groups"][0]["replicas"]
        assert (first["rows"], first["utilization"], first["critical_share"]) == (2, 0.5, 0.25)
        assert shown["groups"][0]["target_replicas"] == 5
        assert [router["running"] for router in shown["routers"]] == [2]

    asyncio.run(story())


def test_the_snapshot_shows_what_the_autoscaler_said_last(core):
    async def story():
        assert core.snapshot({})["policy"] is None
        await core.report_policy(PolicyReport("p.yaml", version="1"))
        await core.report_policy(PolicyReport("p.yaml", version="2"))
        assert core.snapshot({})["policy"]["version"] == "2"

    asyncio.run(story())


def test_transport_bytes_do_not_fall_when_a_router_goes(core, clock):
    async def story():
        await core.report_router(RouterStats("r1", transport_bytes={"stream": 10}))
        await core.report_router(RouterStats("r2", transport_bytes={"stream": 1, "object_store": 7}))
        clock[0] = ROUTER_TIMEOUT_S + 0.1
        await core.report_router(RouterStats("r2", transport_bytes={"stream": 2, "object_store": 7}))
        await core.expire()
        shown = core.snapshot({})
        assert [router["id"] for router in shown["routers"]] == ["r2"]
        assert shown["transport_bytes"] == {"stream": 12, "object_store": 7}
        # A router that was only slow comes back with the same counter, which is not added twice.
        await core.report_router(RouterStats("r1", transport_bytes={"stream": 11}))
        assert core.snapshot({})["transport_bytes"]["stream"] == 13

    asyncio.run(story())


def test_a_restarted_directory_fills_by_the_next_heartbeats(clock):
    async def story():
        reborn = DirectoryCore(FACTS, incarnation="two", clock=lambda: clock[0])
        assert await reborn.report(replica("a"), ReplicaStats(rows=9))
        assert await reborn.report(replace(replica("b", "experts-1"), state=State.DRAINING), ReplicaStats())
        view = await reborn.view(Epoch("one", 2), LONG_S)
        assert (view.epoch.incarnation, [member.id for member in view.replicas]) == ("two", ["a", "b"])

    asyncio.run(story())


def test_loads_are_summed_over_routers_and_kept_when_they_go(core, clock):
    def report(router, *rows, last=False):
        return core.report_loads(LoadReport(router, {0: np.array(rows)}, last, DIGEST))

    async def story():
        assert core.loads() == {"layers": [0], "domains": {"recorded": [[0, 0, 0, 0]]}}
        await core.report_router(RouterStats("one"))
        await report("one", 5, 0, 1, 0)
        await report("two", 0, 7, 0, 0)
        await report("two", 0, 8, 0, 2, last=True)
        clock[0] = ROUTER_TIMEOUT_S + 1
        await core.expire()
        return core.loads()

    assert asyncio.run(story()) == {"layers": [0], "domains": {"recorded": [[5, 8, 1, 2]]}}


def test_loads_of_another_model_are_not_counted_and_said_so(core, caplog):
    asyncio.run(core.report_loads(LoadReport("old", {0: np.ones(4), 1: np.ones(4)})))
    assert core.loads() == {"layers": [0], "domains": {"recorded": [[0, 0, 0, 0]]}}
    assert "old" in caplog.text


def test_loads_of_other_weights_of_the_same_shape_are_not_counted_and_said_once(core, caplog):
    async def story():
        await core.report_loads(LoadReport("new", {0: np.array([1, 0, 0, 0])}, digest=DIGEST))
        for _ in range(3):
            await core.report_loads(LoadReport("old", {0: np.array([0, 9, 0, 0])}, digest="cd" * 32))

    asyncio.run(story())
    assert core.loads()["domains"] == {"recorded": [[1, 0, 0, 0]]}
    assert caplog.text.count("the loads of router old") == 1


def test_killed_routers_are_folded_after_a_while_and_the_sums_never_fall(core, clock):
    async def story():
        for number in range(20):
            router = str(number)
            await core.report_router(RouterStats(router, digest=DIGEST, transport_bytes={"stream": 10}))
            await core.report_loads(LoadReport(router, {0: np.array([1, 0, 0, 0])}, digest=DIGEST))
            clock[0] += FOLD_AFTER_S / 2 + 1
            await core.expire()
            assert core.loads()["domains"] == {"recorded": [[number + 1, 0, 0, 0]]}
            assert core.snapshot({})["transport_bytes"]["stream"] == 10 * (number + 1)
        assert len(core._router_bytes._by_router) == len(core._loads._by_router) == len(core._totals_heard) == 1
        # One that comes back after all is not counted a second time.
        await core.report_router(RouterStats("0", digest=DIGEST, transport_bytes={"stream": 11}))
        await core.report_loads(LoadReport("0", {0: np.array([2, 0, 0, 0])}, digest=DIGEST))
        assert core.snapshot({})["transport_bytes"]["stream"] == 200
        assert core.loads()["domains"] == {"recorded": [[20, 0, 0, 0]]}

    asyncio.run(story())


LEAVING = replica("a", state=State.DRAINING)


def settled(core, clock):
    """It has been there long enough to have heard of every router."""
    clock[0] += ROUTER_TIMEOUT_S + 0.1
    return core


@pytest.mark.parametrize(
    ("others", "routers", "needed"),
    [
        ([], [DIGEST], True),
        ([], [], False),
        ([], ["cd" * 32], False),
        ([replica("b")], [DIGEST], False),
        ([replica("b", state=State.JOINING)], [DIGEST], True),
        ([replica("b", state=State.DRAINING)], [DIGEST], True),
        ([replica("b", "experts-1")], [DIGEST], True),
        ([replace(replica("b"), digest="cd" * 32)], [DIGEST], True),
    ],
)
def test_a_replica_is_needed_while_routers_of_its_model_have_nobody_else(core, clock, others, routers, needed):
    async def story():
        settled(core, clock)
        for each in (LEAVING, *others):
            await core.report(each, ReplicaStats())
        for index, digest in enumerate(routers):
            await core.report_router(RouterStats(str(index), digest=digest))
        return core.needed(LEAVING)

    assert asyncio.run(story()) is needed


def test_a_new_directory_spares_nobody_before_every_router_can_have_been_heard(core, clock):
    assert core.needed(LEAVING)
    clock[0] = ROUTER_TIMEOUT_S + 0.1
    assert not core.needed(LEAVING)


def test_a_router_that_says_its_last_word_needs_nobody(core, clock):
    async def story():
        settled(core, clock)
        await core.report_router(RouterStats("r", digest=DIGEST))
        assert core.needed(LEAVING)
        await core.report_loads(LoadReport("r", {0: np.ones(4)}, last=True))
        assert not core.needed(LEAVING)

    asyncio.run(story())


def failure(reason, part="experts-0"):
    return StartFailure(1.0, part, part, reason, DIGEST)


def test_the_reason_of_a_failed_start_is_known_until_a_replica_of_the_group_becomes_ready(core):
    async def story():
        await core.report(replica("old"), ReplicaStats())
        for number in range(KEPT_FAILURES + 2):
            await core.report_failure(failure(f"reason {number}"))
        await core.report_failure(failure("other", "experts-1"))
        await core.report(replica("old"), ReplicaStats())  # it was ready before
        await core.report(replica("new", state=State.JOINING), ReplicaStats())
        assert core.reasons() == {"experts-0": f"reason {KEPT_FAILURES + 1}", "experts-1": "other"}
        assert len(core.snapshot({})["groups"][0]["failures"]) == KEPT_FAILURES
        await core.report(replica("new"), ReplicaStats())
        assert core.reasons() == {"experts-1": "other"}

    asyncio.run(story())


def test_the_reason_of_a_router_is_known_until_another_router_reports(core):
    async def story():
        await core.report_router(RouterStats("old", digest=DIGEST))
        await core.report_failure(failure("no memory", "router"))
        await core.report_router(RouterStats("old", digest=DIGEST))
        assert core.reasons() == {"router": "no memory"}
        await core.report_router(RouterStats("new", digest=DIGEST))
        assert core.reasons() == {}

    asyncio.run(story())


def test_a_router_that_was_only_silent_has_not_started(core, clock):
    async def story():
        await core.report_router(RouterStats("old", digest=DIGEST))
        clock[0] = ROUTER_TIMEOUT_S + 1
        await core.expire()
        await core.report_failure(failure("no memory", "router"))
        await core.report_router(RouterStats("old", digest=DIGEST))
        assert core.reasons() == {"router": "no memory"}

    asyncio.run(story())


@pytest.mark.parametrize("other", [{"digest": "cd" * 32}, {"pool": "h100"}])
def test_a_replica_of_another_version_or_pool_that_starts_clears_no_reason(core, other):
    async def story():
        await core.report_failure(failure("no disk"))
        await core.report(replace(replica("other"), **other), ReplicaStats())
        assert core.reasons() == {"experts-0": "no disk"}
        await core.report(replica("same"), ReplicaStats())
        assert core.reasons() == {}

    asyncio.run(story())


def test_a_router_of_another_version_that_starts_clears_no_reason(core):
    async def story():
        await core.report_failure(StartFailure(1.0, "router", "Router", "no memory", DIGEST))
        await core.report_router(RouterStats("old", digest="cd" * 32))
        assert core.reasons() == {"router": "no memory"}
        await core.report_router(RouterStats("new", digest=DIGEST))
        assert core.reasons() == {}

    asyncio.run(story())


def test_a_silent_router_is_told_of_for_a_while_unless_it_said_its_last_word_or_comes_back(core, clock):
    async def story():
        for name in ("killed", "stopped", "slow"):
            await core.report_router(RouterStats(name, digest=DIGEST))
        await core.report_loads(LoadReport("stopped", {0: np.zeros(4, np.int64)}, last=True, digest=DIGEST))
        clock[0] = ROUTER_TIMEOUT_S + 1
        await core.expire()
        assert core.degraded() == {
            "silent_routers": "the directory does not hear from routers: killed for 6 s, slow for 6 s"
        }
        await core.report_router(RouterStats("slow", digest=DIGEST))
        assert "slow" not in core.degraded()["silent_routers"]
        clock[0] = ROUTER_SILENCE_TOLD_S + 1
        await core.report_router(RouterStats("slow", digest=DIGEST))
        await core.expire()
        assert core.degraded() == {}

    asyncio.run(story())


def test_an_autoscaler_that_says_nothing_is_a_reason_only_where_there_should_be_one(clock):
    async def story():
        fixed, elastic, routers = (
            DirectoryCore(
                cluster_facts("demo", DIGEST, contiguous({0: 4}, 2), ExpertsSpec(groups=2, replicas=replicas), elastic),
                incarnation="one",
                clock=lambda: clock[0],
            )
            for replicas, elastic in ((1, False), ("elastic", False), (1, True))
        )
        clock[0] = POLICY_SILENCE_S + 1
        assert fixed.degraded() == {}
        assert list(routers.degraded()) == ["autoscaler"]
        assert list(elastic.degraded()) == ["autoscaler"]
        await elastic.report_policy(PolicyReport("p.yaml", error="budget: wrong."))
        assert list(elastic.degraded()) == ["policy_file"]
        await elastic.report_policy(PolicyReport("p.yaml"))
        assert elastic.degraded() == {}
        assert elastic.health() == (False, ["router", "experts-0", "experts-1"]), "what is missing is another matter"

    asyncio.run(story())


def test_routers_that_do_not_hear_from_the_directory_say_so(core):
    async def story():
        await core.report_router(RouterStats("r", digest=DIGEST, view_age_s=STALE_VIEW_S + 1))
        assert list(core.degraded()) == ["directory_updates"]
        assert core.standing().degraded["directory_updates"]
        assert not core.standing().degraded["silent_routers"]

    asyncio.run(story())


def test_the_standing_counts_failed_starts_for_ever_and_sums_what_routers_sent_since_they_were_first_heard(core):
    async def story():
        await core.report_failure(failure("no disk"))
        await core.report(replica("new"), ReplicaStats())
        assert core.reasons() == {}
        for total in (1000, 1001):
            for router in ("a", "b"):
                await core.report_loads(LoadReport(router, {0: np.array([total, 2 * total, 0, 0])}, digest=DIGEST))
        now = core.standing()
        assert now.failed_starts == {"experts-0": 1}
        assert now.rows[0].tolist() == [2, 4, 0, 0]
        assert now.groups == ("experts-0", "experts-1")

    asyncio.run(story())

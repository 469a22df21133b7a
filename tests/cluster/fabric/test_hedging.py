"""Late batches and slow replicas, over a scripted transport and a clock moved by waits (about 3 s)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import EngineError, ExpertsUnavailableError, FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.hedging import BURST, EARNED, FLOOR_S, HANGS_S, PROBE_S
from cluster.membership import Replica
from tests.cluster.fabric.scripted import EXPERTS, FIRST, ROUND_TRIP_S, Behaviour, Router, replica

SLOW_S = 0.05
USUAL = 20


def two(hedge_after: float | None = 3.0) -> Router:
    """Replicas a and b of the first group, both known to answer after `ROUND_TRIP_S`; a is chosen next."""
    router = Router(replica("a", speed=2e6), replica("b", speed=1e6), hedge_after=hedge_after)
    for _ in range(USUAL):
        router.step(FIRST)
    assert set(router.receivers()) == {"a"}
    return router


def steps(router: Router, count: int) -> list[str]:
    """The receivers of that many scatters."""
    for _ in range(count):
        router.step(FIRST)
    return router.receivers()


def test_a_late_batch_is_raced_and_the_first_answer_counts() -> None:
    router = two()
    start_s = router.clock.now
    router.behave("a", Behaviour(answer_s=9.0))
    router.step(FIRST)
    (_, late), (_, hedge) = router.transport.sent
    assert late.into is not None
    assert hedge.into is None, "two that race would write into each other"
    assert router.receivers() == ["a", "b"]
    assert router.clock.now - start_s < 2 * FLOOR_S + ROUND_TRIP_S
    assert (router.dispatcher.stats().hedges, router.dispatcher.stats().resends, router.lost) == (1, 0, [])
    traffic = router.dispatcher.stats().replicas["a"]
    assert traffic.overtaken == 1
    assert "late: another replica was asked after" in traffic.reason


def test_a_replica_whose_own_times_vary_widely_is_measured_by_its_group() -> None:
    router = two()
    router.dispatcher._peers.by_id["a"].spread_s = 1.0
    router.behave("a", Behaviour(answer_s=9.0))
    start_s = router.clock.now
    router.step(FIRST)
    assert router.clock.now - start_s < 2 * FLOOR_S + ROUND_TRIP_S


def test_without_hedging_a_late_batch_is_awaited() -> None:
    router = two(hedge_after=None)
    router.behave("a", Behaviour(answer_s=9.0))
    start_s = router.clock.now
    router.step(FIRST)
    assert router.receivers() == ["a"]
    assert router.clock.now - start_s == pytest.approx(9.0)


def test_a_late_replica_whose_answer_comes_first_after_all_is_taken_at_its_word() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=FLOOR_S + 0.002))
    router.behave("b", Behaviour(answer_s=1.0))
    start_s = router.clock.now
    router.step(FIRST)
    assert router.clock.now - start_s == pytest.approx(FLOOR_S + 0.002)
    assert [call.replica_id for call in router.transport.forgotten] == ["b"]
    assert not router.dispatcher._peers.by_id["a"].late


def test_who_was_overtaken_is_left_alone_until_its_answer_comes_and_is_probed_from_then_on() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=0.2))
    router.step(FIRST)
    router.behave("a", Behaviour())
    router.receivers()
    late = router.dispatcher._peers.by_id["a"]
    while late.late:
        assert steps(router, 1) == ["b"]
    assert 0.18 < router.clock.now < 0.25
    assert late.delay_s > 0.05  # what it took at least, by half
    seen = steps(router, 2000)
    assert seen.count("a") > 500, "a replica that is fast again is used again"
    assert router.dispatcher.stats().probes >= 2
    assert router.dispatcher.stats().hedges == 1


@pytest.mark.parametrize("reported", [True, False])
def test_a_replica_that_became_slow_is_not_the_measure_of_itself(reported: bool) -> None:
    """Ten times as slow, whether it says so or the network is: found out after a few batches, and hardly used since."""
    router = two()
    router.behave("a", Behaviour(answer_s=SLOW_S, compute_s=SLOW_S if reported else 0.0))
    spent_s = []
    for _ in range(3000):
        start_s = router.clock.now
        router.step(FIRST)
        spent_s.append(router.clock.now - start_s)
    spent_s.sort()
    assert spent_s[int(0.99 * len(spent_s))] <= 3 * ROUND_TRIP_S
    assert spent_s[-1] <= 3 * FLOOR_S
    assert router.dispatcher.stats().hedges < 10
    assert 3 <= router.dispatcher.stats().probes <= 3.2 / PROBE_S + 1


@pytest.mark.parametrize("reported", [True, False])
def test_a_slow_replica_that_recovers_is_used_again_within_seconds(reported: bool) -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=SLOW_S, compute_s=SLOW_S if reported else 0.0))
    steps(router, 1000)
    assert steps(router, 100).count("a") <= 1
    router.behave("a", Behaviour())
    back_s = router.clock.now
    while steps(router, 50).count("a") < 10:
        assert router.clock.now - back_s < 10 * PROBE_S


def test_a_probe_is_sent_besides_and_costs_the_step_nothing() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=SLOW_S))
    steps(router, 100)
    probes = router.dispatcher.stats().probes
    while router.dispatcher.stats().probes == probes:
        start_s = router.clock.now
        seen = steps(router, 1)
    assert sorted(seen) == ["a", "b"]
    assert router.clock.now - start_s == pytest.approx(ROUND_TRIP_S)


def test_when_everything_is_late_hedges_stay_within_their_budget() -> None:
    hedging = two().dispatcher._hedging
    assert hedging is not None
    spent = 0
    for _ in range(1000):
        hedging.earn(1)
        spent += hedging.spend(HANGS_S / 2)
    assert EARNED * 1000 <= spent <= BURST + EARNED * 1000


def test_a_machine_that_is_slow_now_and_then_is_not_hedged_for_long() -> None:
    router = two()
    for number in range(400):
        slow = Behaviour(answer_s=HANGS_S / 4 if number % 4 == 3 else ROUND_TRIP_S)
        router.behave("a", slow)
        router.behave("b", slow)
        router.step(FIRST)
    assert router.dispatcher.stats().hedges <= BURST


def test_a_batch_that_hangs_is_raced_even_without_a_budget() -> None:
    router = two()
    hedging = router.dispatcher._hedging
    assert hedging is not None
    hedging._budget = 0.0
    router.behave("a", Behaviour(answer_s=9.0))
    start_s = router.clock.now
    router.step(FIRST)
    assert HANGS_S <= router.clock.now - start_s < HANGS_S + 0.06


def test_one_that_is_overtaken_and_stays_silent_is_lost_after_the_timeout_and_disconnected() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=None))
    router.step(FIRST)
    sent_s = router.clock.now
    while not router.lost:
        router.clock.pass_until(router.clock.now + 0.05)
        router.step(FIRST)
    assert 9.9 < router.clock.now - sent_s < 10.1
    assert router.lost == ["a"]
    assert router.transport.retained[-1] == {"b"}
    assert router.dispatcher.stats().replicas["a"].reason == "no answer within 10 s"
    assert not router.transport.watched
    assert not router.dispatcher._peers.by_id["a"].late


def test_a_silent_replica_without_another_is_disconnected_too() -> None:
    router = Router(replica("a"), hedge_after=3.0)
    router.behave("a", Behaviour(answer_s=None))
    router.clock.at(11.0, lambda: router.behave("a", Behaviour()))
    router.step(FIRST)
    assert (router.lost[0], router.transport.retained[-1]) == ("a", set())


def test_one_that_failed_is_probed_and_comes_back_before_its_time_when_it_answers() -> None:
    router = two()
    router.behave("a", Behaviour(refuses=ReplicaLostError("gone.")))
    router.step(FIRST)
    failed_s = router.clock.now
    router.behave("a", Behaviour())
    router.receivers()
    while steps(router, 10).count("a") < 5:
        pass
    assert router.clock.now - failed_s < 2 * PROBE_S + 0.1
    assert router.lost == ["a"]


def test_one_that_goes_on_failing_costs_only_its_probes() -> None:
    router = two()
    router.behave("a", Behaviour(refuses=ReplicaLostError("gone.")))
    start_s, resends = router.clock.now, router.dispatcher.stats().resends
    count = 3000
    assert steps(router, count) == ["b"] * count
    assert router.clock.now - start_s == pytest.approx(count * ROUND_TRIP_S)
    assert router.dispatcher.stats().resends - resends == 1


def test_a_group_that_is_all_late_waits_for_whoever_answers_first() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=9.0))
    router.behave("b", Behaviour(answer_s=3.0))
    router.step(FIRST)
    assert router.receivers() == ["a", "b"]
    assert router.clock.now == pytest.approx(3.0, abs=0.1)
    router.behave("b", Behaviour())
    start_s = router.clock.now
    assert steps(router, 5) == ["b"] * 5
    assert router.clock.now - start_s == pytest.approx(5 * ROUND_TRIP_S)


def test_a_replica_that_appears_meanwhile_takes_what_is_late() -> None:
    router = Router(replica("a"), hedge_after=3.0)
    steps(router, USUAL)
    router.behave("a", Behaviour(answer_s=9.0))
    router.clock.at(1.0, lambda: router.know(replica("a"), replica("b")))
    router.step(FIRST)
    assert router.receivers() == ["a", "b"]
    assert 1.0 < router.clock.now < 1.2


def test_a_third_replica_takes_over_where_the_second_is_late_too() -> None:
    router = Router(
        *(replica(name, speed=speed) for name, speed in (("a", 3e6), ("b", 2e6), ("c", 1e6))), hedge_after=3
    )
    steps(router, USUAL)
    router.behave("a", Behaviour(answer_s=9.0))
    router.behave("b", Behaviour(answer_s=9.0))
    start_s = router.clock.now
    assert steps(router, 1) == ["a", "b", "c"]
    assert router.clock.now - start_s < 4 * FLOOR_S


def test_when_the_late_one_breaks_the_other_answer_still_counts() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=FLOOR_S + 0.002, errors=[ReplicaLostError("reset.")]))
    router.behave("b", Behaviour(answer_s=0.02))
    assert steps(router, 1) == ["a", "b"]
    assert router.lost == ["a"]


def test_experts_that_raise_in_a_race_do_not_fail_the_step() -> None:
    router = two()
    router.behave("a", Behaviour(answer_s=0.03))
    router.behave("b", Behaviour(errors=[FabricError("ValueError: bad")]))
    assert steps(router, 1) == ["a", "b"]


def test_who_could_not_compute_what_another_could_is_avoided_and_the_reason_is_told() -> None:
    router = two()
    router.behave("a", Behaviour(errors=[FabricError("ValueError: bad")]))
    assert steps(router, 1) == ["a", "b"]
    assert "ValueError: bad (b could compute the same rows)" in router.dispatcher.stats().replicas["a"].reason
    assert steps(router, 5) == ["b"] * 5


def test_rows_go_to_who_is_connected_while_another_one_is_being_connected_to() -> None:
    router = Router(replica("slow", speed=9e6), replica("b"), hedge_after=3.0)
    router.behave("slow", Behaviour(connects_at_s=1.0))
    assert steps(router, 10) == ["b"] * 10
    assert router.clock.now == pytest.approx(10 * ROUND_TRIP_S)
    router.clock.pass_until(1.0)
    assert steps(router, 1) == ["slow"]


def test_a_late_replica_that_is_connected_is_preferred_to_blocking_on_one_that_is_not() -> None:
    router = Router(replica("b"), hedge_after=3.0)
    steps(router, USUAL)
    router.know(replica("b"), replica("hung"))
    router.behave("hung", Behaviour(connects_at_s=50.0))
    router.dispatcher._peers.by_id["b"].late += 1
    router.dispatcher._refresh()
    start_s = router.clock.now
    assert steps(router, 5) == ["b"] * 5
    assert router.clock.now - start_s == pytest.approx(5 * ROUND_TRIP_S)


def test_where_nobody_is_connected_the_first_that_is_gets_the_rows() -> None:
    router = Router(replica("hung"), replica("b"), hedge_after=3.0)
    router.behave("hung", Behaviour(connects_at_s=50.0))
    router.behave("b", Behaviour(connects_at_s=0.8))
    assert steps(router, 1) == ["b"]
    assert 0.8 <= router.clock.now < 1.1


def test_large_batches_give_a_slow_replica_its_share() -> None:
    """Ten times as slow is a tenth of the rows, not none: at these sizes all finish together."""
    router = Router(replica("a", speed=1e4), replica("b", speed=1e4), hedge_after=3.0)
    router.behave("a", Behaviour(answer_s=0.101, compute_s=0.1))
    router.behave("b", Behaviour(answer_s=0.011, compute_s=0.01))
    rows = [[0]] * 1000
    for _ in range(60):
        router.step(rows)
    router.transport.sent.clear()
    router.step(rows)
    shares = {name: len(batch.index) for name, batch in router.transport.sent}
    assert shares.get("a", 0) < shares["b"] / 3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2), min_size=1, max_size=40),
    st.lists(st.sampled_from(["ok", "late", "slow", "lost", "silent", "error", "refused"]), min_size=6, max_size=6),
    st.integers(0, 100),
)
def test_whatever_fails_or_is_late_the_result_is_right_or_there_is_one_error_and_all_is_accounted_for(
    index: list[list[int]], fates: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    replicas = [replica(f"r{i}", i % 2, speed=1e3 * (i + 1)) for i in range(6)]
    router = Router(*replicas, hedge_after=2.0)
    behaviours = {
        "ok": Behaviour(),
        "late": Behaviour(answer_s=0.3),
        "slow": Behaviour(answer_s=9.0, queue_rows=100),
        "lost": Behaviour(errors=[ReplicaLostError("reset.")]),
        "silent": Behaviour(answer_s=None),
        "error": Behaviour(errors=[FabricError("bad")]),
        "refused": Behaviour(refuses=HandshakeError("digest")),
    }
    for known, fate in zip(replicas, fates, strict=True):
        router.behave(known.id, replace(behaviours[fate], errors=list(behaviours[fate].errors)))
    hedging = router.dispatcher._hedging
    assert hedging is not None
    for _ in range(4):
        try:
            router.step(index)
        except (ExpertsUnavailableError, EngineError):
            assert set(fates) - {"ok", "slow", "late"}
        assert not router.transport.open
        assert [each.call for each in hedging.watched] == router.transport.watched
        for peer in router.dispatcher._peers.by_id.values():
            assert peer.in_flight_rows == 0
            assert peer.late == sum(each.peer is peer and not each.probe for each in hedging.watched)
            assert peer.probed == any(each.peer is peer and each.probe for each in hedging.watched)


def test_replicas_that_are_avoided_and_do_not_connect_are_asked_again_now_and_then_and_not_all_the_time() -> None:
    router = two()
    for replica_id in ("a", "b"):
        router.dispatcher._peers.by_id[replica_id].failed("it broke", router.clock.now)
        router.behave(replica_id, Behaviour(connects_at_s=router.clock.now + 2.0))
    asked, prepare = [0], router.transport.prepare

    def counted(replica: Replica, patience_s: float) -> bool:
        asked[0] += 1
        assert asked[0] < 1000, "the engine's thread spins"
        return prepare(replica, patience_s)

    router.transport.prepare = counted  # type: ignore[method-assign]
    start_s = router.clock.now
    router.step(FIRST)
    assert router.clock.now - start_s == pytest.approx(2.0, abs=0.2)
    assert 10 < asked[0] < 200

"""The dispatcher's choices and its failure rule, over a scripted transport and a clock moved by waits (about 5 s)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import (
    DeadlineError,
    EngineError,
    ExpertsUnavailableError,
    FabricError,
    HandshakeError,
    ReplicaLostError,
)
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.scatter import CONNECT_PATIENCE_S
from cluster.fabric.transport import Batch, Call
from cluster.membership import Epoch, Replica, State, View
from cluster.placement import Placement
from tests.cluster.fabric.scripted import (
    BOTH,
    EXPERTS,
    FIRST,
    HIDDEN,
    LAYER,
    ROUND_TRIP_S,
    Behaviour,
    Clock,
    FakeCall,
    FakeTransport,
    Router,
    replica,
)


def test_rows_go_to_the_groups_that_hold_their_experts_and_come_back_to_their_tokens() -> None:
    router = Router(replica("a"), replica("b", 1))
    router.step(BOTH)
    (first, one), (second, two) = router.transport.sent
    assert (first, second) == ("a", "b")
    assert (one.group, one.layer, one.counts.tolist(), one.index.tolist()) == (
        "experts-0",
        LAYER,
        [2, 0, 0, 1],
        [0, 2, 1],
    )
    assert (two.group, two.counts.tolist(), two.index.tolist()) == ("experts-1", [1, 1, 0, 1], [1, 2, 0])


def test_a_group_without_rows_is_not_asked_and_need_not_exist() -> None:
    router = Router(replica("a"))
    router.step(FIRST)
    assert router.receivers() == ["a"]


def test_no_tokens_need_no_replica() -> None:
    router = Router()
    output = router.dispatcher.scatter_gather(
        LAYER, torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    )
    assert output.shape == (0, HIDDEN)


def test_equal_replicas_take_turns() -> None:
    router = Router(replica("a"), replica("b"), replica("c"))
    for _ in range(9):
        router.step(FIRST)
    assert sorted(router.receivers()) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_the_faster_replica_is_chosen_and_measured_speed_corrects_what_was_promised() -> None:
    router = Router(replica("promised", speed=2e6), replica("real", speed=1e6))
    router.behave("promised", Behaviour(answer_s=0.02, compute_s=0.019))
    router.step(FIRST)
    assert router.receivers() == ["promised"]
    for _ in range(20):
        router.step(FIRST)
    assert set(router.receivers()[-5:]) == {"real"}
    assert router.dispatcher.stats().replicas["promised"].speed_rows_per_s < 1e6


def test_a_reported_queue_sends_rows_elsewhere_until_it_must_have_drained() -> None:
    router = Router(replica("a", speed=1000), replica("b", speed=1000))
    router.behave("a", Behaviour(queue_rows=500))
    while "a" not in router.receivers():
        router.step([[0]])
    for _ in range(4):
        router.step([[0]])
    assert set(router.receivers()) == {"b"}
    router.clock.pass_until(router.clock.now + 0.5)
    router.behave("a", Behaviour())
    for _ in range(4):
        router.step([[0]])
    assert set(router.receivers()) == {"a", "b"}


def test_work_beyond_two_hops_is_split_over_the_replicas_of_a_group() -> None:
    router = Router(replica("a", speed=1000), replica("b", speed=3000))
    router.step([[0], [0], [1], [3], [3], [3], [3], [3]])
    sent = dict(router.transport.sent)
    assert (sent["a"].counts.tolist(), sent["a"].index.tolist()) == ([2, 0, 0, 0], [0, 1])
    assert (sent["b"].counts.tolist(), sent["b"].index.tolist()) == ([0, 1, 0, 5], [2, 3, 4, 5, 6, 7])


def test_joining_and_draining_replicas_get_no_rows_but_keep_their_connections() -> None:
    router = Router(
        replica("a", speed=10),
        replica("j", speed=1e6, state=State.JOINING),
        replica("d", speed=1e6, state=State.DRAINING),
    )
    router.step([[0]] * 50)
    assert router.receivers() == ["a"]
    assert router.transport.retained == [{"a", "j", "d"}]


def test_a_lost_replica_is_reported_and_left_alone_for_a_while_and_then_tried_again() -> None:
    router = Router(replica("a", speed=2e6), replica("b", speed=1e6))
    router.behave("a", Behaviour(refuses=ReplicaLostError("gone.")))
    router.step(FIRST)
    assert (router.receivers(), router.lost) == (["b"], ["a"])
    router.behave("a", Behaviour())
    router.step(FIRST)
    assert router.receivers() == ["b"]
    assert router.dispatcher.stats().replicas["a"].reason == "gone."
    router.clock.pass_until(router.clock.now + 5)
    router.step(FIRST)
    assert router.receivers() == ["a"]
    assert router.dispatcher.stats().replicas["a"].reason == ""
    assert router.dispatcher.stats().resends == 1


def test_rows_of_a_connection_that_breaks_are_sent_to_another_replica() -> None:
    router = Router(replica("a", speed=2e6), replica("b"), replica("c", 1))
    router.behave("a", Behaviour(errors=[ReplicaLostError("reset.")]))
    router.step(BOTH)
    assert router.receivers() == ["a", "c", "b"]
    assert router.lost == ["a"]


def test_a_silent_replica_is_given_up_after_the_timeout_and_its_call_forgotten() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(answer_s=None))
    router.step(FIRST)
    assert router.receivers() == ["a", "b"]
    assert router.clock.now == pytest.approx(10 + ROUND_TRIP_S)
    assert [call.replica_id for call in router.transport.forgotten] == ["a"]


def test_a_late_answer_reaches_nobody() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(answer_s=10.0005))
    for _ in range(4):
        router.step(FIRST)
    assert router.receivers() == ["a", "b", "b", "b", "b"]


def test_a_single_replica_that_broke_is_asked_again_after_a_pause() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(refuses=ReplicaLostError("gone.")))
    router.clock.at(2.0, lambda: router.behave("a", Behaviour()))
    router.step(FIRST)
    assert 2.0 <= router.clock.now < 4.1


def test_a_missing_group_is_awaited_and_served_by_who_appears() -> None:
    router = Router(replica("a"))
    router.clock.at(7.0, lambda: router.know(replica("a"), replica("b", 1)))
    router.step(BOTH)
    assert router.receivers() == ["a", "b"]
    assert router.clock.now == pytest.approx(7.0, abs=0.1)


def test_a_group_that_appears_wakes_the_scatter_at_once_when_nothing_else_is_awaited() -> None:
    router = Router()
    router.clock.at(7.0, lambda: router.know(replica("a")))
    router.step(FIRST)
    assert router.clock.now == pytest.approx(7.0 + ROUND_TRIP_S)


def test_a_group_that_does_not_come_fails_after_the_wait_and_nothing_stays_open() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(answer_s=9.0))
    with pytest.raises(ExpertsUnavailableError, match=r"group experts-1 .* 30 s \(no replica is ready\)"):
        router.step(BOTH)
    assert router.clock.now == pytest.approx(30)
    assert not router.transport.open
    router.know(replica("a"), replica("b", 1))
    router.step(BOTH)


def test_open_calls_are_forgotten_when_another_group_fails() -> None:
    router = Router(replica("a"), replica("b", 1))
    router.behave("a", Behaviour(answer_s=5.0))
    router.behave("b", Behaviour(errors=[FabricError("x"), FabricError("x")]))
    with pytest.raises(EngineError):
        router.step(BOTH)
    assert [call.replica_id for call in router.transport.forgotten] == ["a"]
    router.behave("a", Behaviour())
    router.step(BOTH)


def test_a_refused_handshake_makes_a_replica_unusable_and_its_reason_is_told() -> None:
    router = Router(replica("old", speed=2e6), replica("new"))
    router.behave("old", Behaviour(refuses=HandshakeError("model digest ab, not cd")))
    router.step(FIRST)
    assert (router.receivers(), router.lost) == (["new"], [])
    router.know(replica("old"))
    with pytest.raises(ExpertsUnavailableError, match=r"experts-0.*old: model digest ab, not cd"):
        router.step(FIRST)


def test_replicas_that_all_stay_silent_end_in_an_error_and_not_in_a_loop() -> None:
    router = Router(replica("a"), replica("b"))
    router.behave("a", Behaviour(answer_s=None))
    router.behave("b", Behaviour(answer_s=None))
    with pytest.raises(ExpertsUnavailableError, match="no answer within 10 s"):
        router.step(FIRST)
    assert router.clock.now <= 10 + 30 + 10


@pytest.mark.parametrize("silent", [True, False], ids=["experts-silent", "nobody-there"])
def test_when_the_time_is_up_rows_are_awaited_no_more_and_nobody_is_blamed(silent: bool) -> None:
    router = Router(*([replica("a")] if silent else []))
    router.behave("a", Behaviour(answer_s=None))
    router.dispatcher.until_s = 4.0
    with pytest.raises(DeadlineError):
        router.step(FIRST)
    assert router.clock.now == 4.0
    assert not router.transport.open
    assert not router.lost
    assert all(not each.reason for each in router.dispatcher.stats().replicas.values())


def test_experts_are_told_when_nobody_wants_their_results_and_are_not_blamed_for_dropping_them() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(answer_s=4.0, errors=[ReplicaLostError("a: it is too late for these rows")]))
    router.dispatcher.until_s = 4.0
    with pytest.raises(DeadlineError):
        router.step(FIRST)
    assert router.transport.deadlines_s == [4.0]
    assert not router.lost
    router.dispatcher.until_s = 1000.0
    router.step(FIRST)
    assert router.transport.deadlines_s == [4.0, 10.0]


def test_experts_that_raise_are_tried_once_elsewhere() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(errors=[FabricError("ValueError: bad")]))
    router.step(FIRST)
    assert (router.receivers(), router.lost) == (["a", "b"], [])


def test_experts_that_raise_are_tried_once_more_where_there_is_nobody_else() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(errors=[FabricError("ValueError: bad")]))
    router.step(FIRST)
    assert router.receivers() == ["a", "a"]


def test_experts_that_raise_twice_fail_the_step_with_their_message() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(errors=[FabricError("ValueError: bad"), FabricError("ValueError: bad")]))
    with pytest.raises(EngineError, match=r"replica a .* layer 3: ValueError: bad"):
        router.step(FIRST)
    router.step(FIRST)


@pytest.mark.parametrize("wrong", [torch.ones(1, HIDDEN), torch.ones(4, HIDDEN, dtype=torch.float64), torch.ones(4)])
def test_a_result_of_the_wrong_shape_or_dtype_is_refused(wrong: Tensor) -> None:
    router = Router(replica("a"))
    send = router.transport.send

    def answer_wrongly_once(replica: Replica, batch: Batch, deadline_s: float) -> Call:
        call = send(replica, batch, deadline_s)
        assert isinstance(call, FakeCall)
        call.outcome = wrong
        router.transport.send = send  # type: ignore[method-assign]
        return call

    router.transport.send = answer_wrongly_once  # type: ignore[method-assign]
    router.step(FIRST)
    assert router.receivers() == ["a", "a"]


def test_replicas_that_leave_the_view_are_let_go() -> None:
    router = Router(replica("a"), replica("b"))
    router.step(FIRST)
    router.know(replica("b"))
    router.step(FIRST)
    router.step(FIRST)
    assert router.transport.retained == [{"a", "b"}, {"b"}]
    assert set(router.dispatcher.stats().replicas) == {"b"}


def test_traffic_tells_waiting_for_all_from_waiting_for_one() -> None:
    router = Router(replica("a"), replica("b", 1))
    router.behave("b", Behaviour(answer_s=0.005))
    router.step(BOTH)
    router.step(FIRST)
    stats = router.dispatcher.stats()
    assert stats.groups["experts-0"].rows == 3 + 4
    assert stats.groups["experts-1"].rows == 3
    assert stats.groups["experts-0"].wait_s == pytest.approx(0.002)
    assert stats.groups["experts-1"].wait_s == pytest.approx(0.005)
    assert stats.groups["experts-1"].critical_s == pytest.approx(0.004)
    assert stats.groups["experts-0"].critical_s == pytest.approx(0.001)
    assert stats.replicas["a"].rows == 7
    assert stats.transport_bytes == {"fake": 80}
    assert stats.scatters == 2
    assert stats.scatter_s == pytest.approx(0.005 + 0.001)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2), min_size=1, max_size=40),
    st.lists(st.sampled_from(["ok", "slow", "lost", "silent", "error", "refused"]), min_size=6, max_size=6),
    st.integers(0, 100),
)
def test_whatever_fails_the_result_is_right_or_there_is_one_error_and_no_call_stays_open(
    index: list[list[int]], fates: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    replicas = [replica(f"r{i}", i % 2, speed=10.0 * (i + 1)) for i in range(6)]
    router = Router(*replicas)
    behaviours = {
        "ok": Behaviour(),
        "slow": Behaviour(answer_s=9.0, queue_rows=100),
        "lost": Behaviour(errors=[ReplicaLostError("reset.")]),
        "silent": Behaviour(answer_s=None),
        "error": Behaviour(errors=[FabricError("bad")]),
        "refused": Behaviour(refuses=HandshakeError("digest")),
    }
    for known, fate in zip(replicas, fates, strict=True):
        router.behave(known.id, replace(behaviours[fate], errors=list(behaviours[fate].errors)))
    for _ in range(3):
        try:
            router.step(index)
        except (ExpertsUnavailableError, EngineError):
            assert set(fates) - {"ok", "slow"}
        assert not router.transport.open
        assert all(peer.in_flight_rows == 0 for peer in router.dispatcher._peers.by_id.values())


def test_rows_of_each_expert_and_tokens_of_each_layer_are_counted_by_expert_id() -> None:
    owner = {LAYER: (1, 0, 1, 0), LAYER + 1: (0, 1)}
    groups = tuple(
        {layer: tuple(e for e, g in enumerate(row) if g == group) for layer, row in owner.items()} for group in (0, 1)
    )
    dispatcher = Dispatcher(Placement({LAYER: 4, LAYER + 1: 2}, groups), Echo(), wait_s=1, timeout_s=1)
    dispatcher.update(View(Epoch("i", 1), (replica("a"), replica("b", 1))))
    assert {layer: rows.tolist() for layer, rows in dispatcher.loads().items()} == {LAYER: [0] * 4, LAYER + 1: [0] * 2}
    for layer, index in ((LAYER, [[0, 1], [0, 3], [0, 1]]), (LAYER + 1, [[1], [1]]), (LAYER, [[2, 0]])):
        chosen = torch.tensor(index)
        dispatcher.scatter_gather(layer, torch.randn(len(index), HIDDEN), chosen, torch.ones(chosen.shape))
    assert {layer: rows.tolist() for layer, rows in dispatcher.loads().items()} == {
        LAYER: [4, 2, 1, 1],
        LAYER + 1: [0, 2],
    }
    stats = dispatcher.stats()
    assert (stats.layers, stats.tokens) == (2, 6)
    assert {name: traffic.rows for name, traffic in stats.groups.items()} == {"experts-0": 3, "experts-1": 7}


def test_loads_are_a_copy() -> None:
    router = Router(replica("a"), replica("b", 1))
    before = router.dispatcher.loads()
    router.step(BOTH)
    assert before[LAYER].sum() == 0
    assert router.dispatcher.loads()[LAYER].tolist() == [2, 0, 0, 1, 1, 1, 0, 1]


def test_a_scatter_that_fails_is_no_load_and_rows_sent_twice_count_once() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(errors=[ReplicaLostError("reset.")]))
    router.step(FIRST)
    assert router.dispatcher.loads()[LAYER].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    router.behave("b", Behaviour(errors=[FabricError("no."), FabricError("no.")]))
    router.know(replica("b"))
    with pytest.raises(EngineError):
        router.step(FIRST)
    assert router.dispatcher.loads()[LAYER].sum() == 4
    assert router.dispatcher.stats().tokens == 2


def test_whoever_watches_is_told_the_group_of_each_row_as_long_as_it_watches() -> None:
    router = Router(replica("a"), replica("b", 1))
    seen: list[list[list[int]]] = []
    router.step(BOTH)
    router.dispatcher.watch = lambda groups: seen.append(groups.tolist())
    router.step(BOTH)
    router.dispatcher.watch = None
    router.step(BOTH)
    assert seen == [[[0, 1], [0, 1], [0, 1]]]


class Echo(FakeTransport):
    """Every row comes back as it was."""

    def __init__(self) -> None:
        super().__init__(Clock())

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:  # noqa: ARG002
        call = FakeCall(0, replica.id, batch, self.clock.now, batch.hidden[batch.index])
        self.open.append(call)
        return call


def test_an_only_replica_that_connects_late_gets_its_rows() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(connects_at_s=1.2))
    router.step(FIRST)
    assert router.receivers() == ["a"]
    assert 1.2 <= router.clock.now < 1.4


def test_an_only_replica_that_never_connects_holds_rows_no_longer_than_they_may_wait() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(connects_at_s=1e9))
    with pytest.raises(ExpertsUnavailableError, match=r"experts-0 .*a: no answer yet"):
        router.step(FIRST)
    # The first failure is that nothing has come of the first patience.
    assert router.clock.now == pytest.approx(30 + CONNECT_PATIENCE_S, abs=0.01)


def test_a_deadline_is_kept_while_an_only_replica_is_being_connected_to() -> None:
    router = Router(replica("a"), replica("b", group=1))
    router.behave("a", Behaviour(connects_at_s=1e9))
    router.behave("b", Behaviour(connects_at_s=1e9))
    router.dispatcher.until_s = 0.15
    with pytest.raises(DeadlineError):
        router.step(BOTH)
    assert router.clock.now == pytest.approx(0.15, abs=0.005)

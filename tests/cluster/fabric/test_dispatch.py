"""The dispatcher's choices and its failure rule, over a scripted transport and a clock moved by waits (about 5 s).

Expert e multiplies its rows by e + 1, so that a row in the wrong place shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import EngineError, ExpertsUnavailableError, FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.transport import Batch, Call
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous

EXPERTS, HIDDEN, LAYER = 8, 4, 3
ROUND_TRIP_S = 0.001


class Clock:
    """Time that passes only where somebody waits. `events` happen when it reaches them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        self.events.append((time_s, event))

    def pass_until(self, time_s: float, stop: Callable[[], bool] = lambda: False) -> None:
        while not stop():
            due = [event for event in self.events if event[0] <= time_s]
            if not due:
                self.now = max(self.now, time_s)
                return
            first = min(due, key=lambda event: event[0])
            self.events.remove(first)
            self.now = max(self.now, first[0])
            first[1]()


class News:
    """A `threading.Event` in the clock's time."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.is_set = clock, False

    def set(self) -> None:
        self.is_set = True

    def clear(self) -> None:
        self.is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.clock.pass_until(self.clock.now + timeout, lambda: self.is_set)
        return self.is_set


@dataclass(eq=False)
class FakeCall:
    sequence: int
    replica_id: str
    batch: Batch
    answer_at_s: float
    outcome: Tensor | FabricError
    compute_s: float = 0.0
    queue_rows: int = 0
    done: bool = False
    error: FabricError | None = None

    def result(self) -> Tensor:
        assert self.done
        if isinstance(self.outcome, FabricError):
            raise self.outcome
        return self.outcome


def experts_of(group: str) -> range:
    index = int(group.removeprefix("experts-"))
    return range(EXPERTS * index // 2, EXPERTS * (index + 1) // 2)


def compute(batch: Batch) -> Tensor:
    factor = torch.tensor([expert + 1.0 for expert in experts_of(batch.group)])
    return batch.hidden[batch.index] * factor.repeat_interleave(torch.from_numpy(batch.counts)).reshape(-1, 1)


@dataclass
class Behaviour:
    """How one replica acts. Seconds until it answers; None for silence. `errors` come first, one per batch."""

    answer_s: float | None = ROUND_TRIP_S
    refuses: FabricError | None = None
    errors: list[FabricError] = field(default_factory=list)
    compute_s: float = 0.0
    queue_rows: int = 0


class FakeTransport:
    """A scripted transport: every replica answers by its `Behaviour`."""

    name = "fake"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bytes_sent = self.bytes_received = 0
        self.replicas: dict[str, Behaviour] = {}
        self.sent: list[tuple[str, Batch]] = []
        self.open: list[FakeCall] = []
        self.forgotten: list[FakeCall] = []
        self.retained: list[set[str]] = []

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        assert deadline_s > 0
        assert batch.counts.sum() == len(batch.index) > 0
        behaviour = self.replicas.setdefault(replica.id, Behaviour())
        if behaviour.refuses is not None:
            raise behaviour.refuses
        outcome = behaviour.errors.pop(0) if behaviour.errors else compute(batch)
        silent = float("inf") if behaviour.answer_s is None else behaviour.answer_s
        self.sent.append((replica.id, batch))
        self.bytes_sent += 8 * len(batch.index)
        call = FakeCall(
            len(self.sent),
            replica.id,
            batch,
            self.clock.now + silent,
            outcome,
            behaviour.compute_s,
            behaviour.queue_rows,
        )
        self.open.append(call)
        return call

    def wait(self, calls: Collection[Call], timeout_s: float) -> list[Call]:
        wanted = [call for call in self.open if any(call is other for other in calls)]
        assert len(wanted) == len(calls) > 0
        first_s = min(call.answer_at_s for call in wanted)
        self.clock.pass_until(min(first_s, self.clock.now + timeout_s))
        done = [call for call in wanted if call.answer_at_s <= self.clock.now]
        for call in done:
            call.done = True
            call.error = call.outcome if isinstance(call.outcome, FabricError) else None
            self.open.remove(call)
        return sorted(done, key=lambda call: call.answer_at_s)

    def forget(self, call: Call) -> None:
        assert isinstance(call, FakeCall)
        self.forgotten.append(call)
        if call in self.open:
            self.open.remove(call)

    def retain(self, replica_ids: Collection[str]) -> None:
        self.retained.append(set(replica_ids))

    def close(self) -> None: ...


class Router:
    """A dispatcher of 2 groups of 4 experts with its scripted surroundings."""

    def __init__(self, *replicas: Replica) -> None:
        self.clock = Clock()
        self.transport = FakeTransport(self.clock)
        self.lost: list[str] = []
        self.epoch = 0
        self.dispatcher = Dispatcher(
            contiguous({LAYER: EXPERTS}, 2),
            self.transport,
            wait_s=30,
            timeout_s=10,
            on_lost=self.lost.append,
            clock=self.clock,
            news=News(self.clock),
        )
        self.know(*replicas)

    def know(self, *replicas: Replica) -> None:
        self.epoch += 1
        self.dispatcher.update(View(Epoch("i", self.epoch), replicas))

    def behave(self, replica_id: str, behaviour: Behaviour) -> None:
        self.transport.replicas[replica_id] = behaviour

    def step(self, index: list[list[int]]) -> None:
        """One scatter whose result must be right."""
        experts = torch.tensor(index, dtype=torch.int64).reshape(len(index), -1)
        hidden = torch.randn(len(index), HIDDEN)
        weight = torch.rand(experts.shape)
        output = self.dispatcher.scatter_gather(LAYER, hidden, experts, weight)
        rows = hidden.repeat_interleave(experts.shape[1], 0) * (experts.reshape(-1, 1) + 1.0)
        expected = (rows * weight.reshape(-1, 1)).view(*experts.shape, HIDDEN).sum(1)
        assert torch.equal(output, expected)
        assert not self.transport.open

    def receivers(self) -> list[str]:
        ids = [replica_id for replica_id, _ in self.transport.sent]
        self.transport.sent.clear()
        return ids


def replica(replica_id: str, group: int = 0, speed: float = 1e6, state: State = State.READY) -> Replica:
    return Replica(replica_id, f"experts-{group}", "default", Address("n", "/s", "h", 1), "d", speed, state)


BOTH = [[0, 7], [3, 4], [0, 5]]
FIRST = [[0, 1], [2, 3]]


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

"""What the dispatcher's tests share: a scripted transport, a clock moved by waits, and a dispatcher over both.

Expert e multiplies its rows by e + 1, so that a row in the wrong place shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.errors import FabricError, ReplicaLostError
from cluster.fabric.dispatch import Dispatcher
from cluster.fabric.transport import Batch, Call
from cluster.membership import Address, Epoch, Replica, State, View
from cluster.placement import contiguous

EXPERTS, HIDDEN, LAYER = 8, 4, 3
ROUND_TRIP_S = 0.001
CONNECT_S = 2.0
"""How long a batch for a replica that is not connected blocks the thread that sends it."""


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
    transport: str = "fake"
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
    """How one replica acts. Seconds until it answers; None for silence. `errors` come first, one per batch.

    connects_at_s: when it is connected, if somebody has begun to.
    """

    answer_s: float | None = ROUND_TRIP_S
    refuses: FabricError | None = None
    errors: list[FabricError] = field(default_factory=list)
    compute_s: float = 0.0
    queue_rows: int = 0
    connects_at_s: float = 0.0


class FakeTransport:
    """A scripted transport: every replica answers by its `Behaviour`.

    watched: forgotten calls whose answers are still noticed. deadlines_s: of every batch sent.
    """

    name = "fake"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bytes_sent = self.bytes_received = 0
        self.replicas: dict[str, Behaviour] = {}
        self.sent: list[tuple[str, Batch]] = []
        self.open: list[FakeCall] = []
        self.watched: list[FakeCall] = []
        self.forgotten: list[FakeCall] = []
        self.retained: list[set[str]] = []
        self.deadlines_s: list[float] = []

    def prepare(self, replica: Replica, patience_s: float) -> bool:
        at_s = self.replicas.setdefault(replica.id, Behaviour()).connects_at_s
        if self.clock.now < at_s:
            self.clock.pass_until(min(at_s, self.clock.now + patience_s))
        return self.clock.now >= at_s

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> Call:
        assert deadline_s > 0
        self.deadlines_s.append(deadline_s)
        assert batch.counts.sum() == len(batch.index) > 0
        behaviour = self.replicas.setdefault(replica.id, Behaviour())
        if behaviour.refuses is not None:
            raise behaviour.refuses
        if not self.prepare(replica, CONNECT_S):
            raise ReplicaLostError("did not finish the handshake.")
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
            self.open.remove(call)
        for call in [*done, *(each for each in self.watched if each.answer_at_s <= self.clock.now)]:
            call.done = True
            call.error = call.outcome if isinstance(call.outcome, FabricError) else None
        return sorted(done, key=lambda call: call.answer_at_s)

    def forget(self, call: Call, *, watched: bool = False) -> None:
        assert isinstance(call, FakeCall)
        self.forgotten.append(call)
        if call in self.open:
            self.open.remove(call)
        if call in self.watched:
            self.watched.remove(call)
        if watched:
            self.watched.append(call)

    def retain(self, replica_ids: Collection[str]) -> None:
        self.retained.append(set(replica_ids))

    def close(self) -> None: ...


class Router:
    """A dispatcher of 2 groups of 4 experts with its scripted surroundings."""

    def __init__(self, *replicas: Replica, hedge_after: float | None = None) -> None:
        self.clock = Clock()
        self.transport = FakeTransport(self.clock)
        self.lost: list[str] = []
        self.epoch = 0
        self.dispatcher = Dispatcher(
            contiguous({LAYER: EXPERTS}, 2),
            self.transport,
            wait_s=30,
            timeout_s=10,
            hedge_after=hedge_after,
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

    def step(self, index: list[list[int]], meanwhile: Callable[[], None] | None = None) -> None:
        """One scatter whose result must be right."""
        experts = torch.tensor(index, dtype=torch.int64).reshape(len(index), -1)
        hidden = torch.randn(len(index), HIDDEN)
        weight = torch.rand(experts.shape)
        output = self.dispatcher.scatter_gather(LAYER, hidden, experts, weight, meanwhile)
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

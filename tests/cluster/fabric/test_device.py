"""What waits, what runs as one batch, and when results may leave; time is passed in. 1 s."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import ReplicaLostError
from cluster.fabric.device import Device, merge, split
from cluster.fabric.frames import Frame, Kind, Status


def times_expert(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
    return rows * (1 + torch.arange(len(counts)) + 10 * layer).repeat_interleave(counts).view(-1, 1)


def frame(counts: list[int], *, layer: int = 0, deadline_ms: int = 60_000, kind: Kind = Kind.ROWS) -> Frame:
    rows = torch.randn(sum(counts), 4)
    return Frame(
        kind,
        layer=layer,
        rows=sum(counts),
        hidden=4,
        dtype=torch.float32,
        deadline_ms=deadline_ms,
        counts=torch.tensor(counts),
        tensor=rows if kind is Kind.ROWS else None,
        data=b"" if kind is Kind.ROWS else b"payload",
    )


def device(
    compute: Callable[[int, Tensor, Tensor], Tensor] = times_expert,
    rows_per_s: float | None = None,
    codec: object = None,
) -> Device[str]:
    return Device(compute, rows_per_s=rows_per_s, references=codec)


@settings(max_examples=60)
@given(
    st.integers(1, 4).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 4), min_size=experts, max_size=experts).filter(any), min_size=2, max_size=4
        )
    )
)
def test_merged_batches_are_sorted_by_expert_and_split_back(counts: list[list[int]]) -> None:
    batches = [(torch.tensor(c), torch.randn(sum(c), 3)) for c in counts]
    total, rows, order = merge(batches)
    naive = [
        rows_of.split(c)[expert]
        for expert in range(len(counts[0]))
        for c, (_, rows_of) in zip(counts, batches, strict=True)
    ]
    assert torch.equal(rows, torch.cat(naive))
    assert total.tolist() == [sum(column) for column in zip(*counts, strict=True)]
    for part, (_, sent) in zip(split(rows, order, [sum(c) for c in counts]), batches, strict=True):
        assert torch.equal(part, sent)
        assert part.is_contiguous()


def test_a_single_batch_is_not_copied() -> None:
    rows = torch.randn(3, 2)
    _, merged, order = merge([(torch.tensor([3]), rows)])
    assert merged is rows
    assert order is None


def test_all_rows_of_the_layer_that_waited_longest_run_as_one_batch() -> None:
    batches: list[tuple[int, list[int]]] = []

    def compute(layer: int, counts: Tensor, rows: Tensor) -> Tensor:
        batches.append((layer, counts.tolist()))
        return times_expert(layer, counts, rows)

    machine = device(compute)
    frames = [frame([1, 2], layer=1), frame([2, 0], layer=0), frame([0, 1], layer=1)]
    for owner, sent in zip("abc", frames, strict=True):
        machine.add(owner, sent, 0.0)
    assert machine.queue_rows == 6
    first = machine.step(0.0)
    assert batches == [(1, [1, 3])]
    assert [outcome.owner for outcome in first] == ["a", "c"]
    assert machine.queue_rows == 2
    second = machine.step(0.0)
    assert machine.idle
    for outcome in first + second:
        assert outcome.output is not None
        assert outcome.frame.tensor is not None
        assert outcome.frame.counts is not None
        assert torch.equal(
            outcome.output, times_expert(outcome.frame.layer, outcome.frame.counts, outcome.frame.tensor)
        )
    assert (machine.rows, machine.batches, machine.frames, machine.queue_rows) == (6, 2, 3, 0)


def test_late_rows_are_not_computed() -> None:
    machine = device(lambda *_: pytest.fail("computed"))
    machine.add("a", frame([1], deadline_ms=10), 0.0)
    (outcome,) = machine.step(0.011)
    assert (outcome.status, outcome.output) == (Status.LATE, None)
    assert machine.idle


@pytest.mark.parametrize("wrong", [lambda rows: rows[:, :1], lambda rows: rows.double(), lambda rows: rows.view(7)])
def test_experts_that_fail_answer_their_batch_with_the_reason(wrong: Callable[[Tensor], Tensor]) -> None:
    machine = device(lambda _layer, _counts, rows: wrong(rows))
    for owner in "ab":
        machine.add(owner, frame([1]), 0.0)
    outcomes = machine.step(0.0)
    assert [outcome.status for outcome in outcomes] == [Status.FAILED] * 2
    assert "Error: " in outcomes[0].message


def test_the_rows_of_a_lost_router_are_not_computed() -> None:
    machine = device()
    machine.add("a", frame([2]), 0.0)
    machine.add("b", frame([1]), 0.0)
    machine.add("a", frame([2], layer=1), 0.0)
    machine.drop("a")
    assert machine.queue_rows == 1
    assert [outcome.owner for outcome in machine.step(0.0)] == ["b"]
    assert machine.idle


def test_an_emulated_device_answers_when_it_would_be_done_and_lets_rows_wait() -> None:
    machine = device(rows_per_s=100.0)
    machine.add("a", frame([5]), 1.0)
    assert machine.wait_s(1.0) == 0.0
    assert machine.step(1.0) == []
    assert machine.wait_s(1.0) == pytest.approx(0.05)
    machine.add("b", frame([3]), 1.01)
    machine.add("c", frame([7]), 1.02)
    assert machine.step(1.049) == []
    assert machine.queue_rows == 10
    (outcome,) = machine.step(1.051)
    assert (outcome.owner, outcome.compute_s) == ("a", 0.05)
    # The next batch began when the device became free (1.05), not when this thread woke up.
    assert machine.step(1.06) == []
    assert machine.wait_s(1.06) == pytest.approx(1.05 + 0.1 - 1.06)
    assert [outcome.owner for outcome in machine.step(1.151)] == ["b", "c"]
    assert machine.wait_s(1.151) is None
    assert machine.busy_s == pytest.approx(0.15)


class Codec:
    """Loads ones, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def load(self, payload: bytes, counts: Tensor) -> Tensor:
        assert payload == b"payload"
        if self.error is not None:
            raise self.error
        return torch.ones(int(counts.sum()), 4)

    def store(self, rows: Tensor) -> tuple[object, bytes]:
        raise NotImplementedError

    def release(self, token: object) -> None:
        raise NotImplementedError


def test_references_are_loaded_into_the_same_batch_as_rows() -> None:
    machine = device(codec=Codec())
    machine.add("a", frame([1, 1], kind=Kind.REFERENCE), 0.0)
    machine.add("b", frame([0, 1]), 0.0)
    first, second = machine.step(0.0)
    assert machine.batches == 1
    assert first.output is not None
    assert first.output[:, 0].tolist() == [1.0, 2.0]
    assert second.output is not None


@pytest.mark.parametrize(
    ("codec", "status"),
    [
        (None, Status.FAILED),
        (Codec(RuntimeError("no store")), Status.FAILED),
        (Codec(ReplicaLostError("owner is gone")), Status.LOST),
    ],
)
def test_rows_that_cannot_be_loaded_fail_alone(codec: Codec | None, status: Status) -> None:
    machine = device(codec=codec)
    machine.add("a", frame([1], kind=Kind.REFERENCE), 0.0)
    machine.add("b", frame([1]), 0.0)
    outcomes = {outcome.owner: outcome for outcome in machine.step(0.0)}
    assert outcomes["a"].status is status
    assert outcomes["b"].output is not None


def test_batches_are_counted_by_their_rows_and_their_time() -> None:
    machine = device(rows_per_s=1000.0)
    now = 0.0
    for rows in (1, 3, 3):
        machine.add("a", frame([rows, 0]), now)
        machine.step(now)
        now += 1.0
        machine.step(now)
    assert machine.batches == sum(machine.batch_rows.counts) == sum(machine.batch_s.counts) == 3
    assert machine.batch_rows.counts[:3] == [1, 0, 2]
    # As the emulated device would take: 1 and 3 ms.
    assert machine.batch_s.counts[3:6] == [1, 0, 2]

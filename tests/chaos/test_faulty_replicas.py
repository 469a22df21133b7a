"""Expert replicas that hang, lie, break off or crawl: the tokens stay the same, and no step waits for them for long.

A router in this process, good replicas in processes of their own, a faulty double of each group beside them; without
Ray (about 60 s).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from cluster.config import ExpertsSpec
from cluster.membership import Epoch, Replica, View
from deployments.experts.replica import ExpertReplica
from tests.chaos import faulty_replica
from tests.chaos.faulty_replica import Fault, FaultyReplica
from tests.chaos.split_router import GROUPS, HEDGED_S, Model, routing, small_model
from tests.expert_pool import KEY, NODE, ExpertPool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """For the whole module."""
    return small_model(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def good(model: Model) -> Iterator[list[Replica]]:
    """A good replica of each group, which all doubles are measured against."""
    with ExpertPool(GROUPS) as pool:
        yield [each.record for each in pool.serve(model.blueprint, model.config().experts)]


@contextmanager
def doubles(model: Model, fault: Fault, **options: int) -> Iterator[list[FaultyReplica]]:
    """A faulty replica of each group."""
    spec: ExpertsSpec = model.config().experts
    with ExitStack() as stack:
        made = [
            FaultyReplica(model.blueprint, spec, i, fault, replica_id=f"faulty-{i}", **options) for i in range(GROUPS)
        ]  # type: ignore[arg-type]
        yield [stack.enter_context(each) for each in made]


BREAKING: dict[str, tuple[Fault, str]] = {
    "garbage": (faulty_replica.garbage, "frame"),
    "closes in a payload": (faulty_replica.closes_in_a_payload, "closed the connection"),
    "one row too many": (faulty_replica.wrong_size, "answers no call"),
    "another dtype": (faulty_replica.wrong_dtype, "answers no call"),
    "an unknown sequence": (faulty_replica.unknown_sequence, "answers no call"),
    "another digest": (faulty_replica.another_digest, "digest"),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_replica_that_sends_what_no_replica_sends_is_lost_at_once_and_its_rows_go_elsewhere(
    name: str, model: Model, good: list[Replica]
) -> None:
    fault, reason = BREAKING[name]
    with doubles(model, fault) as faulty, routing(model, [*good, *(each.record() for each in faulty)]) as router:
        reasons: set[str] = set()

        def told() -> bool:
            reasons.update(router.stats.replicas[f"faulty-{i}"].reason for i in range(GROUPS))
            return {"faulty-0", "faulty-1"} <= set(router.lost) and any(reason in text for text in reasons)

        router.answer()
        router.until(told)
        assert router.longest_s < HEDGED_S
        assert router.stats.resends >= GROUPS
        assert router.ties == 0


def test_a_replica_whose_experts_fail_is_left_alone_with_its_reason(model: Model, good: list[Replica]) -> None:
    with (
        doubles(model, faulty_replica.raises) as faulty,
        routing(model, [*good, *(each.record() for each in faulty)]) as router,
    ):
        router.until(lambda: all(each.faults for each in faulty))
        assert router.longest_s < HEDGED_S
        assert "out of luck (replica-0 could compute" in router.stats.replicas["faulty-0"].reason
        assert router.ties == 0


STALLING = {
    "half a frame": faulty_replica.half_a_frame,
    "silence": faulty_replica.silent,
    "one byte a second": faulty_replica.trickles,
}


@pytest.mark.parametrize("name", STALLING)
def test_a_replica_that_falls_silent_is_overtaken_at_once_and_lost_after_the_timeout(
    name: str, model: Model, good: list[Replica]
) -> None:
    with (
        doubles(model, STALLING[name]) as faulty,
        routing(model, [*good, *(each.record() for each in faulty)]) as router,
    ):
        router.until(lambda: {"faulty-0", "faulty-1"} <= set(router.lost))
        assert router.longest_s < HEDGED_S
        assert all(router.stats.replicas[f"faulty-{i}"].overtaken for i in range(GROUPS))
        assert router.ties == 0


def test_a_replica_that_accepts_and_never_answers_the_handshake_stops_nobody(model: Model, good: list[Replica]) -> None:
    with (
        doubles(model, faulty_replica.silent, answers_handshakes=False) as faulty,
        routing(model, [*good, *(each.record() for each in faulty)]) as router,
    ):
        router.until(lambda: {"faulty-0", "faulty-1"} <= set(router.lost))
        assert router.longest_s < HEDGED_S
        assert router.ties == 0


def test_a_replica_ten_times_as_slow_is_overtaken_and_used_no_more(model: Model, good: list[Replica]) -> None:
    with (
        doubles(model, faulty_replica.slow(0.05)) as faulty,
        routing(model, [*good, *(each.record() for each in faulty)]) as router,
    ):
        router.until(lambda: all(each.faults for each in faulty))
        faults = sum(each.faults for each in faulty)
        scatters, start_s = router.stats.scatters, time.monotonic()
        while router.stats.scatters < scatters + 400:
            router.answer()
        # Probes, one of each group in half a second, and what noise makes of them.
        assert sum(each.faults for each in faulty) - faults <= 2 * GROUPS * (2 * (time.monotonic() - start_s) + 1)
        assert router.longest_s < HEDGED_S
        assert (router.lost, router.ties) == ([], 0)


SPEED_ROWS_PER_S = 2000.0
ROUNDS = 16


def test_one_replica_of_three_ten_times_as_slow_leaves_the_step_time_within_three_times(
    model: Model, record_property: Callable[[str, object], None]
) -> None:
    """Emulated devices, so that two cores do not decide. The slow one promises the speed of the others."""
    spec = model.config().experts
    with ExpertPool(2 * GROUPS) as pool, ExitStack() as stack:
        good = [each.record for each in pool.serve(model.blueprint, spec, emulate_rows_per_s=SPEED_ROWS_PER_S)]
        slow = []
        for index in range(GROUPS):
            names = {"replica_id": f"slow-{index}", "node": NODE}
            emulated = SPEED_ROWS_PER_S / 10
            made = ExpertReplica(model.blueprint, spec, index, key=KEY, emulate_rows_per_s=emulated, **names)
            stack.callback(made.close)
            slow.append(replace(made.record(), speed_rows_per_s=SPEED_ROWS_PER_S))
        with routing(model, good) as router:
            router.answer()
            p99_ms = []
            for number, view in enumerate(([], slow), start=2):
                router.runtime.dispatcher.update(View(Epoch("test", number), (*good, *view)))
                router.forget()
                for _ in range(ROUNDS):
                    router.answer()
                p99_ms.append(1e3 * sorted(router.gaps_s)[int(0.99 * len(router.gaps_s))])
            stats = router.stats
    without, with_slow = p99_ms
    record_property("p99_step_ms_without_and_with_a_slow_replica", [round(each, 2) for each in p99_ms])
    record_property("hedges_probes", [stats.hedges, stats.probes])
    assert all(stats.replicas[each.id].rows for each in slow)
    assert with_slow <= 3 * without
    assert router.ties == 0


# -- processes ---------------------------------------------------------------------------------------------------------


@contextmanager
def processes(model: Model, size: int) -> Iterator[tuple[list[Replica], Callable[[int, signal.Signals], None]]]:
    """That many replicas in processes of their own, and how to send one a signal; stopped ones go on at the end."""
    with ExpertPool(size) as pool:
        pids = [process.pid for process, _ in pool._workers]
        started = pool.serve(model.blueprint, model.config().experts)
        try:
            yield [each.record for each in started], lambda number, what: os.kill(pids[number], what)
        finally:
            for process, _ in pool._workers:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGCONT)


def test_kill_9_of_one_of_two_replicas_stalls_no_stream_for_half_a_second(model: Model) -> None:
    with processes(model, 2 * GROUPS) as (replicas, send), routing(model, replicas, timeout_s=10.0) as router:
        router.answer()
        router.forget()
        router.answer(lambda: send(0, signal.SIGKILL))
        router.answer()
        assert router.longest_s < 0.5
        assert router.lost[:1] == ["replica-0"]
        assert router.ties == 0


def test_a_stopped_replica_stalls_no_stream_for_longer_than_a_hedge_takes(model: Model) -> None:
    with processes(model, 2 * GROUPS) as (replicas, send), routing(model, replicas, timeout_s=10.0) as router:
        router.answer()
        router.forget()
        router.answer(lambda: send(0, signal.SIGSTOP))
        for _ in range(3):
            router.answer()
        assert router.longest_s < HEDGED_S
        send(0, signal.SIGCONT)
        before = router.stats.replicas["replica-0"].rows
        router.until(lambda: router.stats.replicas["replica-0"].rows > before)
        assert router.longest_s < HEDGED_S
        assert (router.lost, router.ties) == ([], 0)


def test_requests_wait_while_all_replicas_of_a_group_are_stopped_and_go_on_with_the_first(model: Model) -> None:
    with processes(model, 2 * GROUPS) as (replicas, send), routing(model, replicas, timeout_s=10.0) as router:
        router.answer()
        router.forget()

        def stop_both() -> None:
            send(0, signal.SIGSTOP)
            send(GROUPS, signal.SIGSTOP)
            threading.Timer(3.0, send, (0, signal.SIGCONT)).start()

        router.answer(stop_both)
        assert 2.0 < router.longest_s < 3.0 + HEDGED_S
        assert (router.lost, router.ties) == ([], 0)

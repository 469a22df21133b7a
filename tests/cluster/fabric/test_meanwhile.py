"""The caller's own work while rows are away: it is done once, and falsifies nothing that is measured. 0.1 s."""

from __future__ import annotations

import pytest

from cluster.fabric.peers import FIRST_HOP_S, Peer
from tests.cluster.fabric.scripted import BOTH, FIRST, ROUND_TRIP_S, Behaviour, Router, replica

WORK_S = 1.0


def work(router: Router) -> None:
    """Takes a second."""
    router.clock.pass_until(router.clock.now + WORK_S)


def peer(router: Router, replica_id: str = "a") -> Peer:
    return router.dispatcher._peers.by_id[replica_id]


def test_it_is_done_once_when_all_rows_are_on_their_way() -> None:
    router = Router(replica("a"), replica("b", 1))
    away: list[list[str]] = []
    router.step(BOTH, lambda: away.append([call.replica_id for call in router.transport.open]))
    assert away == [["a", "b"]]


def test_it_is_done_once_where_rows_have_nowhere_to_go() -> None:
    router = Router(replica("a"))
    away: list[list[str]] = []
    router.clock.at(7.0, lambda: router.know(replica("a"), replica("b", 1)))
    router.step(BOTH, lambda: away.append([call.replica_id for call in router.transport.open]))
    assert away == [["a"]]


def test_no_call_stays_open_where_it_fails() -> None:
    router = Router(replica("a"), replica("b", 1))

    def fail() -> None:
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        router.step(BOTH, fail)
    assert not router.transport.open
    assert [call.replica_id for call in router.transport.forgotten] == ["a", "b"]
    assert peer(router).in_flight_rows == peer(router, "b").in_flight_rows == 0
    router.step(BOTH)


@pytest.mark.parametrize("answer_s", [0.5 * WORK_S, 1.25 * WORK_S])
def test_only_time_really_waited_is_critical(answer_s: float) -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(answer_s=answer_s))
    router.step(FIRST, lambda: work(router))
    traffic = router.dispatcher.stats().groups["experts-0"]
    assert traffic.critical_s == pytest.approx(max(0.0, answer_s - WORK_S))
    assert traffic.wait_s == pytest.approx(max(WORK_S, answer_s))


def test_of_two_groups_the_later_is_critical_from_the_earlier_on() -> None:
    router = Router(replica("a"), replica("b", 1))
    router.behave("b", Behaviour(answer_s=WORK_S + 0.25))
    router.step(BOTH, lambda: work(router))
    groups = router.dispatcher.stats().groups
    assert groups["experts-0"].critical_s == 0
    assert groups["experts-1"].critical_s == pytest.approx(0.25)


def test_an_answer_that_lay_there_does_not_raise_the_hop() -> None:
    router = Router(replica("a"))
    for _ in range(50):
        router.step(FIRST, lambda: work(router))
    assert peer(router).hop_s == FIRST_HOP_S


def test_an_answer_that_lay_there_may_lower_the_hop() -> None:
    router = Router(replica("a"))
    router.behave("a", Behaviour(answer_s=3 * WORK_S))
    for _ in range(100):
        router.step(FIRST)
    assert peer(router).hop_s > 2 * WORK_S
    router.behave("a", Behaviour())
    router.step(FIRST, lambda: work(router))
    assert peer(router).hop_s == pytest.approx(WORK_S)


def test_the_speed_is_learnt_from_answers_that_lay_there() -> None:
    router = Router(replica("a", speed=1e6))
    router.behave("a", Behaviour(answer_s=0.021, compute_s=0.02))
    for _ in range(100):
        router.step(FIRST, lambda: work(router))
    assert peer(router).speed_rows_per_s == pytest.approx(len(FIRST) * 2 / 0.02, rel=0.01)


def test_what_comes_after_the_first_look_is_measured_as_ever() -> None:
    router = Router(replica("a"), replica("b", 1))
    router.behave("b", Behaviour(answer_s=WORK_S + 0.5))
    router.step(BOTH, lambda: work(router))
    assert peer(router).hop_s == FIRST_HOP_S
    assert peer(router, "b").hop_s > FIRST_HOP_S


def test_rows_sent_after_it_are_measured_as_ever() -> None:
    router = Router()
    router.clock.at(WORK_S + 1, lambda: router.know(replica("a")))
    router.step(FIRST, lambda: work(router))
    assert peer(router).hop_s > FIRST_HOP_S


def test_silence_counts_from_its_end() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(answer_s=15.0))
    router.step(FIRST, lambda: router.clock.pass_until(9.0))
    assert router.receivers() == ["a"]
    assert (router.clock.now, router.lost) == (15.0, [])


def test_a_replica_silent_for_longer_is_given_up() -> None:
    router = Router(replica("a", speed=2e6), replica("b"))
    router.behave("a", Behaviour(answer_s=None))
    router.step(FIRST, lambda: router.clock.pass_until(9.0))
    assert router.receivers() == ["a", "b"]
    assert router.clock.now == pytest.approx(9 + 10 + ROUND_TRIP_S)

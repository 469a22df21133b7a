"""Where calls are, and which replicas are avoided for how long. Milliseconds."""

from __future__ import annotations

from deployments.whereabouts import MAX_CALLS, SUSPECT_S, Placed, Whereabouts
from tests.deployments.router.fake_backbone import FakeClock


def test_a_call_is_where_it_was_sent_last_until_it_ends() -> None:
    clock = FakeClock()
    known = Whereabouts(clock)
    assert known.placed("call") is None
    known.place("call", "a")
    clock.now = 3
    known.place("call", "b")
    known.place("other", "a")
    assert known.placed("call") == Placed("b", 3)
    known.withdraw("call")
    known.withdraw("unknown")
    assert known.placed("call") is None
    assert known.placed("other") == Placed("a", 3)


def test_the_oldest_calls_are_forgotten_first() -> None:
    known = Whereabouts(FakeClock())
    for index in range(MAX_CALLS):
        known.place(str(index), "a")
    known.place("0", "b")
    known.place("one more", "a")
    assert known.placed("1") is None
    assert known.placed("0") is not None
    assert known.placed("2") is not None


def test_a_suspect_is_avoided_for_a_while() -> None:
    clock = FakeClock()
    known = Whereabouts(clock)
    known.suspect("a")
    clock.now = 30
    known.suspect("b")
    assert known.suspects() == {"a", "b"}
    clock.now = SUSPECT_S
    assert known.suspects() == {"b"}


def test_only_an_answer_to_a_call_made_later_clears_a_suspect() -> None:
    clock = FakeClock()
    known = Whereabouts(clock)
    known.place("before", "a")
    clock.now = 1
    known.suspect("a")
    known.suspect("b")
    known.heard("before")
    known.heard("unknown")
    assert known.suspects() == {"a", "b"}
    clock.now = 2
    known.place("after", "a")
    known.heard("after")
    assert known.suspects() == {"b"}
    known.heard("after")

"""Stop strings, against an oracle that reads one character at a time (2 s)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.ingress.stops import StopMatcher

SHORT = st.text("abc", min_size=1, max_size=5)


def oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """What may be shown of `text`: up to the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.lists(st.text("abc", max_size=6), max_size=8), st.lists(SHORT, max_size=4))
def test_result_does_not_depend_on_how_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    matched = matcher.matched
    assert (shown + matcher.flush(), matched) == oracle("".join(pieces), stops)


@given(st.text("abc", max_size=20), st.lists(SHORT, min_size=1, max_size=4))
def test_holds_back_only_what_could_still_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if not matcher.matched:
        held = text[len(shown) :]
        could_grow = [n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stops)]
        assert len(held) == max(could_grow)


def test_text_before_the_stop_is_shown_and_nothing_after() -> None:
    matcher = StopMatcher(["\n\nEND"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two\n\nE") == "\ntwo"
    assert matcher.push("ND three") == ""
    assert matcher.matched
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert matcher.push("text") == "text"
    assert not matcher.matched

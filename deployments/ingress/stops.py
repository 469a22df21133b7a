"""Stop strings over a stream of text: what may be shown, what must wait, where to end.

One Knuth-Morris-Pratt automaton per stop string, one step per character, so the cost does not depend on the length of
a stop string and the result does not depend on how the text was cut into pieces. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Shows text up to the first stop string to be completed; of several completed at once the longest counts.

    Invariants: no character of a completed stop string is ever shown; what is held back is exactly the longest suffix
    that could still grow into a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The part of (held text + `text`) that may be shown now. After a match: nothing more."""
        if self.matched:
            return ""
        if not self._automata:
            return text
        buffer = self._held + text
        for end in range(len(self._held), len(buffer)):
            character = buffer[end]
            completed = [a.length for a in self._automata if a.step(character)]
            if completed:
                self.matched = True
                self._held = ""
                return buffer[: end + 1 - max(completed)]
        shown = len(buffer) - max(automaton.state for automaton in self._automata)
        self._held = buffer[shown:]
        return buffer[:shown]

    def flush(self) -> str:
        """The text still held, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """`state` is the length of the longest prefix of the stop string that the text read so far ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.length = len(stop)
        self.state = 0
        # _fallback[n]: the longest proper prefix of the stop string that is also a suffix of its first n characters.
        self._fallback = [0] * (len(stop) + 1)
        state = 0
        for n in range(1, len(stop)):
            while state and stop[n] != stop[state]:
                state = self._fallback[state]
            state += stop[n] == stop[state]
            self._fallback[n + 1] = state

    def step(self, character: str) -> bool:
        """Read one character; True where it completes the stop string. Not to be called again after that."""
        while self.state and self._stop[self.state] != character:
            self.state = self._fallback[self.state]
        self.state += self._stop[self.state] == character
        return self.state == self.length

"""Replicas that load, and those of them that vanished without a word: a kill for lack of memory leaves no other trace.

Each says every `BEAT_S` that it loads, and how much memory there is; at the end it says that it is over, however it
ended. One that falls silent before that has left nothing but its last word. Silence is all that is known: it may have
been killed, or its whole node may hang. So the sentence says no more, and is taken back when the process speaks again.
Not noticed: a process that vanishes before its first word (while it imports), and one that vanishes while the Directory
is down. Pure; knows no Ray and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.stats import StartFailure

BEAT_S = 2.0
SILENCE_S = 10.0
"""As long as a replica that serves may be silent."""
FORGET_S = 600.0
"""Nothing is kept of a start that has been silent for longer, not even the sentence."""


@dataclass(frozen=True)
class Loading:
    """A word from a replica that loads. Bytes.

    start: unique to this start. n: number of the word; one that was overtaken on its way says nothing.
    time: Unix seconds. part, deployment, digest: as in `StartFailure`. host: name of its machine.
    resident_bytes: held by the process. available_bytes: what its machine could still give. over: its last word.
    """

    start: str
    n: int
    time: float
    part: str
    deployment: str
    digest: str
    host: str
    pid: int
    resident_bytes: int
    available_bytes: int
    over: bool = False


@dataclass
class _Start:
    word: Loading
    heard_s: float
    failure: StartFailure | None = None


class StartsUnderWay:
    """Every start that has been heard of in the last `FORGET_S`. now: seconds, monotonic."""

    def __init__(self) -> None:
        self._starts: dict[str, _Start] = {}

    def hear(self, word: Loading, now: float) -> StartFailure | None:
        """Take a word; returns the failure that it disproves, if any."""
        known = self._starts.get(word.start)
        if known is None:
            self._starts[word.start] = _Start(word, now)
            return None
        if known.word.over or word.n <= known.word.n:
            return None
        self._starts[word.start] = _Start(word, now)
        return known.failure

    def vanished(self, now: float) -> list[StartFailure]:
        """The failures of those that have just been silent for too long."""
        silent = [
            start
            for start in self._starts.values()
            if not start.word.over and start.failure is None and now - start.heard_s > SILENCE_S
        ]
        for start in silent:
            word = start.word
            start.failure = StartFailure(word.time, word.part, word.deployment, silence(word), word.digest)
        return [start.failure for start in silent if start.failure is not None]

    def forget(self, now: float) -> list[StartFailure]:
        """Drop what is old; returns the failures among it."""
        old = [name for name, start in self._starts.items() if now - start.heard_s > FORGET_S]
        dropped = [self._starts.pop(name).failure for name in old]
        return [failure for failure in dropped if failure is not None]


def silence(word: Loading) -> str:
    """The sentence about a replica whose last word this was."""
    return (
        f"{word.deployment} cannot start: process {word.pid} on {word.host[:64]} fell silent while it loaded, without "
        f"an error (killed?); at its last word it held {word.resident_bytes / 2**20:,.0f} MiB, and its machine had "
        f"{word.available_bytes / 2**20:,.0f} MiB of memory left."
    )

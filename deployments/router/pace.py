"""How often one stream of a router gets a message: the more streams there are, the more tokens travel in each.

A message on its way through Serve, router to ingress to proxy to client, costs a CPU about a millisecond whatever it
holds, more than computing a token does on a small machine. So a router spends a fixed number of messages a second,
shared by its streams: alone, a stream gets each token about as soon as a screen can show it; among many, several tokens
at a time, none later than the longest interval, and in all of them sooner than if the messages had used up the CPU.
vLLM's `stream_interval` is the same bargain as a fixed number of tokens. Knows no chunks and no clock.
"""

from __future__ import annotations

SHORTEST_S = 0.04
"""Between two messages of a stream that has the router for itself: 25 a second look continuous, as in a film."""
LONGEST_S = 0.25


class Pace:
    """The interval between two messages of a stream, for the streams that are open now, one for every choice of a
    request. For one asyncio thread.

    chunks_per_s: messages of all streams together, above which intervals grow, up to `LONGEST_S`.
    """

    def __init__(self, chunks_per_s: float) -> None:
        self._chunks_per_s = chunks_per_s
        self._streams = 0

    @property
    def interval_s(self) -> float:
        """Seconds from one message of a stream to its next.

        >>> pace = Pace(160)
        >>> for _ in range(32): pace.enter()
        >>> pace.interval_s
        0.2
        """
        return min(max(self._streams / self._chunks_per_s, SHORTEST_S), LONGEST_S)

    def enter(self, streams: int = 1) -> None:
        """So many more streams."""
        self._streams += streams

    def leave(self, streams: int = 1) -> None:
        """So many less."""
        self._streams -= streams

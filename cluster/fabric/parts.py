"""Rows of one layer on their way: a part of a group's rows, and one sending of it to one replica. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.fabric.balance import Share
from cluster.fabric.peers import Peer
from cluster.fabric.transport import Batch, Call


@dataclass(slots=True, eq=False)
class Part:
    """Rows `start` to `stop` in sorted order, all of one group, and what became of them so far.

    compute_failures: how often an expert raised. failed_at: the replica where it did. sent: how many of its sendings
    are open; several race each other.
    """

    group: int
    start: int
    stop: int
    counts: npt.NDArray[np.int64]
    compute_failures: int = 0
    failed_at: str = ""
    first_failure_s: float | None = None
    sent: int = 0

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(slots=True, eq=False)
class Sent:
    """One sending that is open. overtaken: another replica was asked for the same rows, because this one is late."""

    part: Part
    peer: Peer
    batch: Batch
    call: Call
    at_s: float
    overtaken: bool = False


def piece(part: Part, share: Share) -> Part:
    """The rows of `share` as a part of their own, with the history of `part`."""
    ends = part.counts.cumsum().clip(share.start, share.stop) - share.start
    return Part(
        part.group,
        part.start + share.start,
        part.start + share.stop,
        np.diff(ends, prepend=0),
        part.compute_failures,
        part.failed_at,
        part.first_failure_s,
    )

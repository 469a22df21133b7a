"""What all scatters of a dispatcher share: its surroundings, and memory that is used again by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.fabric.hedging import Hedging
from cluster.fabric.packing import Results, SortedRows
from cluster.fabric.peers import Peer, Peers
from cluster.fabric.transport import Transport


class News(Protocol):
    """What wakes a scatter that waits for the directory: a `threading.Event`, or a double that moves time."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Buffers:
    """Memory of one dispatcher, used again by every layer: the rows on their way out, and their results.

    memory: where results are handed out from, see `staging`.
    """

    def __init__(self, memory: Callable[[int], Tensor]) -> None:
        self.rows = SortedRows()
        self.results = Results(memory)


@dataclass(frozen=True)
class Environment:
    """The surroundings.

    names: of the groups, by index. refresh: adopts the directory's latest view into `peers`; `news` is set when there
    may be one. wait_s, timeout_s, on_lost: see `Dispatcher`. hedging: None for never.
    """

    names: tuple[str, ...]
    transport: Transport
    peers: Peers
    wait_s: float
    timeout_s: float
    on_lost: Callable[[str], None]
    clock: Callable[[], float]
    news: News
    refresh: Callable[[], None]
    hedging: Hedging | None

    @property
    def silence(self) -> str:
        """Why a replica that does not answer is given up."""
        return f"no answer within {self.timeout_s:g} s"

    def disconnect(self, peer: Peer) -> None:
        """End the connection to a replica that has been silent for too long: what is left on it, half a frame perhaps,
        would be in the way of whatever comes next.
        """
        if self.hedging is not None:
            self.hedging.drop(peer)
        self.transport.retain(set(self.peers.by_id) - {peer.replica.id})

    def give_up(self, peer: Peer, now: float) -> None:
        """`peer` did not answer something that nobody waited for any more."""
        peer.failed(self.silence, now)
        self.disconnect(peer)
        self.on_lost(peer.replica.id)

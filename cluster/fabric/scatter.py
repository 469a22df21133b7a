"""One layer's rows on their way: sent, awaited, sent elsewhere where they are not answered.

Expert FFNs have no state, so a row can always be computed again. The failure rule: a broken connection, a refused
handshake, a draining replica or `timeout_s` of silence makes a replica avoided for a while, and its rows go to another
one; where there is none, to the same after a pause or to whoever the directory names meanwhile, until `wait_s` after
the first failure. Rows that the experts fail to compute are tried once more, elsewhere if possible. Whatever ends a
scatter, none of its calls stays open, so no late reply can reach a later one.

Knows no wire format, and no more of the directory than `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cluster.errors import EngineError, ExpertsUnavailableError, FabricError, HandshakeError, ReplicaLostError
from cluster.fabric.balance import Share, split
from cluster.fabric.packing import Packed, Results, SortedRows
from cluster.fabric.peers import NEVER, Peer, Peers
from cluster.fabric.transport import Batch, Call, Transport

STRANDED_POLL_S = 0.05
"""How often rows without a replica are looked at again while replies for other rows are awaited."""
COMPUTE_TRIES = 2


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
    """What all scatters of a dispatcher share.

    names: of the groups, by index. refresh: adopts the directory's latest view into `peers`; `news` is set when there
    may be one. wait_s, timeout_s, on_lost: see `Dispatcher`.
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


@dataclass(slots=True)
class _Part:
    """Rows `start` to `stop` in sorted order, all of one group, and what became of them so far.

    compute_failures: how often an expert raised. failed_at: the replica where it did.
    """

    group: int
    start: int
    stop: int
    counts: npt.NDArray[np.int64]
    compute_failures: int = 0
    failed_at: str = ""
    first_failure_s: float | None = None


@dataclass(slots=True)
class _Sent:
    part: _Part
    peer: Peer
    batch: Batch
    call: Call
    at_s: float


class Scatter:
    """Every row is open (sent), stranded (nobody to send it to) or among the results.

    answered: (group, time of its last row) in order of time. resends: batches that failed in some way. free_s: when the
    caller's own work was done, before which nobody listened; `NEVER` where there was none.
    """

    def __init__(
        self, environment: Environment, layer: int, hidden: Tensor, packed: Packed, buffers: Buffers, turn: int
    ) -> None:
        """hidden: [T, H] on the CPU. turn: rotates the choice between equal replicas."""
        self.answered: list[tuple[int, float]] = []
        self.resends = 0
        self.free_s = NEVER
        self._env = environment
        self._layer = layer
        self._hidden = hidden
        self._packed = packed
        self._buffers = buffers
        self._turn = turn
        self._open: dict[int, _Sent] = {}
        self._stranded: list[_Part] = []
        self._listened = False
        self._missing = {rows.group: rows.stop - rows.start for rows in packed.groups}

    def run(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Fill the results of all rows. `meanwhile` is called once, when they are on their way.

        Raises:
            ExpertsUnavailableError, EngineError: see `Dispatcher.scatter_gather`.
        """
        buffers, hidden = self._buffers, self._hidden
        buffers.rows.start(hidden, self._packed.token)
        buffers.results.start(len(self._packed.order), hidden.shape[1], hidden.dtype)
        try:
            for group, start, stop, counts in self._packed.groups:
                self._place(_Part(group, start, stop, counts))
            if meanwhile is not None:
                meanwhile()
                self.free_s = self._env.clock()
            while self._open or self._stranded:
                self._gather()
                if self._stranded:
                    self._place_stranded()
        finally:
            for sent in self._open.values():
                self._forget(sent)

    def _place(self, part: _Part) -> None:
        """Send the rows of `part` to one replica or several, or strand them."""
        todo = [part]
        while todo:
            part = todo.pop()
            now = self._env.clock()
            peers = self._env.peers.usable(self._env.names[part.group], now)
            if part.failed_at:
                peers = [peer for peer in peers if peer.replica.id != part.failed_at] or peers
            if len(peers) == 1:
                if not self._send(part, peers[0], now):
                    todo.append(part)
            elif peers:
                todo += [piece for piece, peer in self._cut(part, peers, now) if not self._send(piece, peer, now)]
            else:
                if part.first_failure_s is None:
                    part.first_failure_s = now
                self._stranded.append(part)

    def _cut(self, part: _Part, peers: Sequence[Peer], now: float) -> list[tuple[_Part, Peer]]:
        """What each of `peers`, several, is to compute of `part`."""
        hop_s = max(peer.hop_s for peer in peers)
        shares = split([peer.candidate(now) for peer in peers], part.counts.tolist(), hop_s, self._turn)
        if len(shares) == 1:
            return [(part, peers[shares[0].candidate])]
        return [(_piece(part, share), peers[share.candidate]) for share in shares]

    def _send(self, part: _Part, peer: Peer, now: float) -> bool:
        """Whether `part` is on its way; if not, the failure has been noted."""
        start, stop, buffers = part.start, part.stop, self._buffers
        batch = Batch(
            self._env.names[part.group],
            self._layer,
            part.counts,
            self._packed.token[start:stop],
            self._hidden,
            rows=partial(buffers.rows.run, start, stop),
            into=buffers.results.run(start, stop),
        )
        try:
            call = self._env.transport.send(peer.replica, batch, self._env.timeout_s)
        except FabricError as error:
            self._failed(part, peer, error)
            return False
        peer.in_flight_rows += stop - start
        self._open[id(call)] = _Sent(part, peer, batch, call, now)
        return True

    def _gather(self) -> None:
        """Wait for replies, or for whatever may change the lot of stranded rows."""
        env = self._env
        if not self._open:
            env.news.wait(self._pause_s(env.clock()))
            return
        # Entered in order of time.
        silent_at_s = self._silent_at_s(next(iter(self._open.values())))
        timeout_s = max(silent_at_s - env.clock(), 0.0)
        if self._stranded:
            timeout_s = min(timeout_s, STRANDED_POLL_S)
        done = env.transport.wait([sent.call for sent in self._open.values()], timeout_s)
        now = env.clock()
        for call in done:
            self._take(call, now)
        self._listened = True
        if now >= silent_at_s:
            self._give_up_silent(now)

    def _take(self, call: Call, now: float) -> None:
        """Put the rows of a finished call into their places, or deal with its failure."""
        sent = self._open.pop(id(call), None)
        if sent is None:
            return
        part, peer = sent.part, sent.peer
        rows = part.stop - part.start
        peer.in_flight_rows -= rows
        try:
            if not sent.batch.placed:
                result = call.result()
                if result.shape != (rows, self._hidden.shape[1]) or result.dtype != self._hidden.dtype:
                    raise FabricError(f"a result of {tuple(result.shape)} {result.dtype} for {rows} rows.")
                self._buffers.results.put(part.start, result)
        except FabricError as error:
            self._failed(part, peer, error)
            self._place(part)
            return
        # What the first look after the caller's own work finds may have come long before.
        exact = self._listened or sent.at_s >= self.free_s
        peer.answered(rows, now - sent.at_s, call.compute_s, call.queue_rows, now, exact=exact)
        self._missing[part.group] -= rows
        if not self._missing[part.group]:
            self.answered.append((part.group, now))

    def _failed(self, part: _Part, peer: Peer, error: FabricError) -> None:
        """Note the failure. Raises where `part` has had its chances."""
        now = self._env.clock()
        self.resends += 1
        if part.first_failure_s is None:
            part.first_failure_s = now
        if isinstance(error, ReplicaLostError | HandshakeError):
            peer.failed(str(error), now)
            if isinstance(error, ReplicaLostError):
                self._env.on_lost(peer.replica.id)
            self._check_wait(part, now)
            return
        part.compute_failures += 1
        part.failed_at = peer.replica.id
        if part.compute_failures >= COMPUTE_TRIES:
            raise EngineError(f"replica {peer.replica.id} could not compute layer {self._layer}: {error}") from error

    def _give_up_silent(self, now: float) -> None:
        for sent in [sent for sent in self._open.values() if now >= self._silent_at_s(sent)]:
            del self._open[id(sent.call)]
            self._forget(sent)
            self._failed(sent.part, sent.peer, ReplicaLostError(f"no answer within {self._env.timeout_s:g} s"))
            self._place(sent.part)

    def _silent_at_s(self, sent: _Sent) -> float:
        return max(sent.at_s, self.free_s) + self._env.timeout_s

    def _forget(self, sent: _Sent) -> None:
        self._env.transport.forget(sent.call)
        sent.peer.in_flight_rows -= sent.part.stop - sent.part.start

    def _place_stranded(self) -> None:
        # Cleared before the view is read: a view that comes in between wakes the next wait at once.
        self._env.news.clear()
        self._env.refresh()
        now = self._env.clock()
        stranded, self._stranded = self._stranded, []
        for part in stranded:
            self._place(part)
        for part in self._stranded:
            self._check_wait(part, now)

    def _pause_s(self, now: float) -> float:
        """Until something may have changed for a stranded part: a retry falls due, or its time is up."""
        due_s = [self._give_up_s(part) for part in self._stranded]
        for part in self._stranded:
            retry_s = self._env.peers.next_retry_s(self._env.names[part.group])
            if retry_s is not None:
                due_s.append(retry_s)
        return max(min(due_s) - now, 0.0)

    def _give_up_s(self, part: _Part) -> float:
        return float("inf") if part.first_failure_s is None else part.first_failure_s + self._env.wait_s

    def _check_wait(self, part: _Part, now: float) -> None:
        if now >= self._give_up_s(part):
            group = self._env.names[part.group]
            raise ExpertsUnavailableError(
                f"group {group} did not answer within {self._env.wait_s:g} s ({self._env.peers.reasons(group)})"
            )


def _piece(part: _Part, share: Share) -> _Part:
    """The rows of `share` as a part of their own, with the history of `part`."""
    ends = part.counts.cumsum().clip(share.start, share.stop) - share.start
    return _Part(
        part.group,
        part.start + share.start,
        part.start + share.stop,
        np.diff(ends, prepend=0),
        part.compute_failures,
        part.failed_at,
        part.first_failure_s,
    )

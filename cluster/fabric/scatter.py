"""One layer's rows on their way: sent, awaited, sent elsewhere where they are not answered.

Expert FFNs have no state, so a row can always be computed again. The failure rule: a broken connection, a refused
handshake, a draining replica or `timeout_s` of silence makes a replica avoided for a while, and its rows go to another
one; where there is none, to the same after a pause or to whoever the directory names meanwhile, until `wait_s` after
the first failure. Rows that the experts fail to compute are tried once more, elsewhere if possible. Rows that are only
late are sent to a second replica as well, and the first answer counts (`hedging`). Whatever ends a scatter, none of its
calls stays open, so no late reply can reach a later one.

Knows no wire format, and no more of the directory than `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from cluster.errors import (
    DeadlineError,
    EngineError,
    ExpertsUnavailableError,
    FabricError,
    HandshakeError,
    ReplicaLostError,
)
from cluster.fabric.balance import Share, split
from cluster.fabric.environment import Buffers, Environment
from cluster.fabric.hedging import FLOOR_S, PROBE_ROWS, PROBE_TICK_S, RECHECK_S, Hedging
from cluster.fabric.packing import Packed
from cluster.fabric.parts import Part, Sent, piece
from cluster.fabric.peers import NEVER, Peer, candidates
from cluster.fabric.transport import HEDGE, PROBE, RESEND, Batch, Call

STRANDED_POLL_S = 0.05
"""How often rows without a replica are looked at again while replies for other rows are awaited."""
COMPUTE_TRIES = 2
TICK_S = 0.001
"""No wait is finer: what is late in less is late."""
CONNECT_PATIENCE_S = 0.1
"""How long a replica that is the only choice and not connected is waited for before the rows count as stranded."""


class Scatter:
    """Every row is open (sent), stranded (nobody to send it to) or among the results.

    answered: (group, time of its last row) in order of time. resends: batches that failed in some way. free_s: when the
    caller's own work was done, before which nobody listened; `NEVER` where there was none.
    """

    def __init__(
        self,
        environment: Environment,
        layer: int,
        hidden: Tensor,
        packed: Packed,
        buffers: Buffers,
        *,
        turn: int,
        until_s: float,
    ) -> None:
        """hidden: [T, H] on the CPU. turn: rotates the choice between equal replicas. until_s: see `Dispatcher`."""
        self.answered: list[tuple[int, float]] = []
        self.resends = 0
        self.free_s = NEVER
        self._env = environment
        self._layer = layer
        self._hidden = hidden
        self._packed = packed
        self._buffers = buffers
        self._turn = turn
        self._until_s = until_s
        self._open: dict[int, Sent] = {}
        self._stranded: list[Part] = []
        self._listened = False
        # When to look for late batches; what a batch's lateness is costs more to say than most layers take.
        self._look_s = float("inf")
        self._missing = {rows.group: rows.stop - rows.start for rows in packed.groups}

    def run(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Fill the results of all rows. `meanwhile` is called once, when they are on their way.

        Raises:
            ExpertsUnavailableError, EngineError, DeadlineError: see `Dispatcher.scatter_gather`.
        """
        buffers, hidden, hedging = self._buffers, self._hidden, self._env.hedging
        buffers.rows.start(hidden, self._packed.token)
        buffers.results.start(len(self._packed.order), hidden.shape[1], hidden.dtype)
        try:
            if hedging is not None:
                self._prepare(hedging)
            for group, start, stop, counts in self._packed.groups:
                self._place(Part(group, start, stop, counts))
            if meanwhile is not None:
                meanwhile()
                self.free_s = self._env.clock()
                self._look_s = max(self._look_s, self.free_s + FLOOR_S)
            while self._open or self._stranded:
                self._gather()
                if self._stranded:
                    self._place_stranded()
        finally:
            for sent in list(self._open.values()):
                self._dismiss(sent)

    def _prepare(self, hedging: Hedging) -> None:
        """Before the rows leave: the budget of their hedges, and probes of replicas that may have recovered."""
        groups = self._packed.groups
        hedging.earn(len(groups))
        now = self._env.clock()
        if now < hedging.look_for_slow_s:
            return
        hedging.look_for_slow_s = now + PROBE_TICK_S
        for group, start, stop, counts in groups:
            peer = hedging.to_probe(self._env.peers, self._env.names[group], now)
            if peer is not None:
                part = piece(Part(group, start, stop, counts), Share(0, 0, min(stop - start, PROBE_ROWS)))
                self._probe(hedging, part, peer, now)

    def _probe(self, hedging: Hedging, part: Part, peer: Peer, now: float) -> None:
        """Let `peer` compute `part` for nobody; what it fails to do teaches too."""
        env = self._env
        try:
            if env.transport.prepare(peer.replica, 0.0):
                batch = self._batch(part)
                batch.attempt = PROBE
                call = env.transport.send(peer.replica, batch, env.timeout_s)
                hedging.probes += 1
                peer.asked_s = now
                hedging.watch(peer, call, part.rows, now, now, probe=True)
        except FabricError as error:
            self._note(peer, error, now)

    def _place(self, part: Part) -> None:
        """Send the rows of `part` to one replica or several, or strand them."""
        todo = [part]
        while todo:
            part = todo.pop()
            now = self._env.clock()
            group = self._env.names[part.group]
            peers = self._env.peers.usable(group, now)
            if part.failed_at:
                peers = [peer for peer in peers if peer.replica.id != part.failed_at] or peers
            if peers:
                alone = len(self._env.peers.ready(group)) == 1
                peers = self._reached(part, peers[0], now) if alone else self._connected(part, peers, now)
                now = self._env.clock()
            if len(peers) == 1:
                if not self._send(part, peers[0], now):
                    todo.append(part)
            elif peers:
                todo += [cut for cut, peer in self._cut(part, peers, now) if not self._send(cut, peer, now)]
            else:
                if part.first_failure_s is None:
                    part.first_failure_s = now
                self._stranded.append(part)

    def _reached(self, part: Part, peer: Peer, now: float) -> Sequence[Peer]:
        """`peer`, the only one of its group, if it takes rows soon; nobody, if the rows must look for it again."""
        patience_s = min(CONNECT_PATIENCE_S, self._until_s - now, self._give_up_s(part) - now)
        if self._connects(part, peer, max(0.0, patience_s)):
            return (peer,)
        peer.retry_at_s = max(peer.retry_at_s, self._env.clock() + STRANDED_POLL_S)
        return ()

    def _connected(self, part: Part, peers: Sequence[Peer], now: float) -> Sequence[Peer]:
        """Those of `peers` that take rows at once; else those of their group that are late, but do; else the first that
        will, or none.
        """
        ready, prepare = [], self._env.transport.prepare
        for peer in peers:  # `_connects`, without the price of its call
            try:
                if prepare(peer.replica, 0.0):
                    ready.append(peer)
            except FabricError as error:
                self._failed(part, peer, error)
        if ready:
            return ready
        for peer in self._env.peers.ready(self._env.names[part.group]):
            if peer.late and peer not in peers and not peer.is_avoided(now) and self._connects(part, peer, 0.0):
                return [peer]
        for peer in peers:
            if not peer.is_avoided(now) and self._connects(part, peer, CONNECT_PATIENCE_S):
                return [peer]
        for peer in peers:  # those that are avoided, too: else they would be asked again at once, and again
            peer.retry_at_s = max(peer.retry_at_s, self._env.clock() + STRANDED_POLL_S)
        return ()

    def _connects(self, part: Part, peer: Peer, patience_s: float) -> bool:
        """See `Transport.prepare`; if that fails, this has been noted."""
        try:
            return self._env.transport.prepare(peer.replica, patience_s)
        except FabricError as error:
            self._failed(part, peer, error)
            return False

    def _cut(self, part: Part, peers: Sequence[Peer], now: float) -> list[tuple[Part, Peer]]:
        """What each of `peers`, several, is to compute of `part`."""
        hop_s = max(peer.hop_s for peer in peers)
        shares = split(candidates(peers, now), part.counts.tolist(), hop_s, self._turn)
        if len(shares) == 1:
            return [(part, peers[shares[0].candidate])]
        return [(piece(part, share), peers[share.candidate]) for share in shares]

    def _batch(self, part: Part, into: memoryview | None = None) -> Batch:
        start, stop = part.start, part.stop
        return Batch(
            self._env.names[part.group],
            self._layer,
            part.counts,
            self._packed.token[start:stop],
            self._hidden,
            rows=partial(self._buffers.rows.run, start, stop),
            into=into,
        )

    def _send(self, part: Part, peer: Peer, now: float) -> bool:
        """Whether `part` is on its way; if not, the failure has been noted.

        Only the first of several that race may leave its result in place: two would write into each other.
        """
        start, stop, env = part.start, part.stop, self._env
        if part.sent:
            batch = self._batch(part)
            batch.attempt = HEDGE
        else:
            batch = self._batch(part, self._buffers.results.run(start, stop))
            if part.first_failure_s is not None:
                batch.attempt = RESEND
        try:
            call = env.transport.send(peer.replica, batch, min(env.timeout_s, max(0.001, self._until_s - now)))
        except FabricError as error:
            self._failed(part, peer, error)
            return False
        part.sent += 1
        peer.in_flight_rows += stop - start
        peer.asked_s = now
        self._open[id(call)] = Sent(part, peer, batch, call, now)
        if now + FLOOR_S < self._look_s:
            self._look_s = now + FLOOR_S
        return True

    def _gather(self) -> None:
        """Wait for replies, or for whatever may change the lot of stranded rows."""
        env, hedging = self._env, self._env.hedging
        if not self._open:
            now = env.clock()
            env.news.wait(max(0.0, min(self._pause_s(now), self._until_s - now)))
            self._check_deadline(env.clock())
            return
        # Entered in order of time.
        silent_at_s = self._silent_at_s(next(iter(self._open.values())))
        next_s = min(silent_at_s, self._until_s)
        if hedging is not None and self._look_s < next_s:
            next_s = self._look_s
        timeout_s = max(next_s - env.clock(), 0.0)
        if self._stranded:
            timeout_s = min(timeout_s, STRANDED_POLL_S)
        done = env.transport.wait([sent.call for sent in self._open.values()], timeout_s)
        now = env.clock()
        if now >= self._until_s:  # before a replica is blamed that has dropped what came too late
            done = [call for call in done if call.error is None]
        for call in done:
            self._take(call, now)
        self._listened = True
        self._check_deadline(now)
        if hedging is not None:
            if hedging.watched:
                hedging.look(now)
            if now >= self._look_s:
                self._race_late(hedging, now)
        if now >= silent_at_s:
            self._give_up_silent(now)

    def _race_late(self, hedging: Hedging, now: float) -> None:
        """Send what is late to another replica as well, and say when to look again."""
        self._look_s = float("inf")
        for sent in list(self._open.values()):
            if sent.overtaken:
                continue
            group = self._env.names[sent.part.group]
            good = self._env.peers.good(group, now)
            age_s = now - max(sent.at_s, self.free_s)
            again_s = hedging.late_after_s(sent, good) - age_s
            if again_s < TICK_S:
                again_s = RECHECK_S
                racers = [each.peer for each in self._open.values() if each.part is sent.part]
                others = [peer for peer in good if peer not in racers]
                if not others:
                    self._env.refresh()  # somebody may have come meanwhile
                elif hedging.spend(age_s) and self._overtake(sent, others, age_s, now):
                    hedging.hedges += 1
                    continue
            self._look_s = min(self._look_s, now + again_s)

    def _overtake(self, sent: Sent, others: Sequence[Peer], age_s: float, now: float) -> bool:
        """Ask the best of `others` for the same rows; False where none can be asked."""
        part, late = sent.part, sent.peer
        ready = [peer for peer in others if self._connects(part, peer, 0.0)]
        if not ready:
            return False
        best = min(ready, key=lambda peer: peer.usual_s(part.rows, now))
        sent.overtaken = True
        late.late += 1
        late.overtaken += 1
        late.reason = f"late: another replica was asked after {age_s:.3g} s"
        # Where this fails, and the late one has not answered, the next look finds the new failure.
        if not self._send(part, best, now):
            sent.overtaken = False
            late.late -= 1
            return False
        return True

    def _take(self, call: Call, now: float) -> None:
        """Put the rows of a finished call into their places, or deal with its failure."""
        sent = self._open.get(id(call))
        if sent is None:
            return
        part, peer = sent.part, sent.peer
        rows = part.stop - part.start
        del self._open[id(call)]
        part.sent -= 1
        peer.in_flight_rows -= rows
        if sent.overtaken:
            peer.late -= 1
        result: Tensor | None = None
        try:
            if not sent.batch.placed:
                result = call.result()
                if result.shape != (rows, self._hidden.shape[1]) or result.dtype != self._hidden.dtype:
                    raise FabricError(f"a result of {tuple(result.shape)} {result.dtype} for {rows} rows.")
        except FabricError as error:
            self._failed(part, peer, error)
            if not part.sent:
                self._place(part)
            return
        if part.sent:  # before the result is put there: what is left of theirs must not be written over it
            for rival in [each for each in self._open.values() if each.part is part]:
                self._dismiss(rival)
        if result is not None:
            self._buffers.results.put(part.start, result)
        if sent.overtaken:
            peer.rows += rows
            peer.caught_up(rows, now - sent.at_s, call.compute_s, call.queue_rows, now)
        else:
            # What the first look after the caller's own work finds may have come long before.
            exact = self._listened or sent.at_s >= self.free_s
            peer.answered(rows, now - sent.at_s, call.compute_s, call.queue_rows, now, exact=exact)
        if part.failed_at:
            self._blame(part, peer, now)
        self._missing[part.group] -= rows
        if not self._missing[part.group]:
            self.answered.append((part.group, now))

    def _blame(self, part: Part, peer: Peer, now: float) -> None:
        """What `peer` could compute and another one could not was no fault of the rows."""
        unable = self._env.peers.by_id.get(part.failed_at)
        if unable is not None and unable is not peer:
            unable.failed(f"{unable.reason} ({peer.replica.id} could compute the same rows)", now)
        part.failed_at = ""

    def _failed(self, part: Part, peer: Peer, error: FabricError) -> None:
        """Note the failure. Raises where `part` has had its chances and nobody else is at it."""
        now = self._env.clock()
        self.resends += 1
        if part.first_failure_s is None:
            part.first_failure_s = now
        self._note(peer, error, now)
        if isinstance(error, ReplicaLostError | HandshakeError):
            if not part.sent:
                self._check_wait(part, now)
            return
        part.compute_failures += 1
        part.failed_at = peer.replica.id
        if part.compute_failures >= COMPUTE_TRIES and not part.sent:
            raise EngineError(f"replica {peer.replica.id} could not compute layer {self._layer}: {error}") from error

    def _note(self, peer: Peer, error: FabricError, now: float) -> None:
        """A failure is the replica's, except that rows which it cannot compute may be at fault themselves."""
        if isinstance(error, ReplicaLostError | HandshakeError):
            peer.failed(str(error), now)
            if isinstance(error, ReplicaLostError):
                self._env.on_lost(peer.replica.id)
        else:
            peer.reason = str(error)

    def _give_up_silent(self, now: float) -> None:
        silent = [sent for sent in self._open.values() if now >= self._silent_at_s(sent)]
        for sent in silent:
            self._env.transport.forget(sent.call)
            self._close(sent)
            if sent.overtaken:
                sent.peer.late -= 1
        for peer in {id(sent.peer): sent.peer for sent in silent}.values():
            self._env.disconnect(peer)
        for sent in silent:
            self._failed(sent.part, sent.peer, ReplicaLostError(self._env.silence))
            if not sent.part.sent:
                self._place(sent.part)

    def _silent_at_s(self, sent: Sent) -> float:
        return max(sent.at_s, self.free_s) + self._env.timeout_s

    def _close(self, sent: Sent) -> None:
        """`sent` is no longer open, whatever became of it."""
        del self._open[id(sent.call)]
        part = sent.part
        part.sent -= 1
        sent.peer.in_flight_rows -= part.stop - part.start

    def _dismiss(self, sent: Sent) -> None:
        """Wait no more for `sent`; one that was overtaken is still to be noticed."""
        self._close(sent)
        hedging = self._env.hedging
        if sent.overtaken and hedging is not None:
            hedging.watch(sent.peer, sent.call, sent.part.rows, sent.at_s, self._env.clock(), probe=False)
        else:
            self._env.transport.forget(sent.call)

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

    def _give_up_s(self, part: Part) -> float:
        return float("inf") if part.first_failure_s is None else part.first_failure_s + self._env.wait_s

    def _check_deadline(self, now: float) -> None:
        if now >= self._until_s and (self._open or self._stranded):
            raise DeadlineError("The time of this request was up while it waited for experts.")

    def _check_wait(self, part: Part, now: float) -> None:
        if now >= self._give_up_s(part):
            group = self._env.names[part.group]
            raise ExpertsUnavailableError(
                f"group {group} did not answer within {self._env.wait_s:g} s ({self._env.peers.reasons(group)})"
            )

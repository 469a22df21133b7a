"""When a late batch is raced by a second replica, what that may cost, and how a replica that was found slow comes back.

A batch is late after `after` times the usual time. Usual is what the replica itself has taken lately, or what another
one of its group would take, whichever is less: a replica that became slow is not the measure of itself. The first
answer counts ("The Tail at Scale", Dean and Barroso 2013). Below a floor of some milliseconds and of some hops a busy
machine is at work and no slow replica. Hedges are paid from a budget earned by batches, so that they add no more than a
tenth to the load when everything is slow; a batch that hangs for long does not ask for it.

Whoever was overtaken is late, and chosen only where all are, until the answer comes that nobody waits for any more: it
still teaches. At decode sizes one replica is chosen, so one that was found slow would never be asked again: now and
then it gets rows that a good one gets as well, a probe. A probe costs no latency, its answer only teaches.

Belongs to the thread that dispatches; time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.fabric.parts import Sent
from cluster.fabric.peers import Peer, Peers, slow_ones
from cluster.fabric.transport import Call, Transport

FLOOR_S, FLOOR_HOPS = 0.005, 10
"""No batch is late before: so long, and so many hops of its replica."""
RECHECK_S = 0.05
"""How soon a late batch is looked at again for which there was no second replica or no budget."""
EARNED, BURST = 0.1, 16.0
"""Hedges that one batch earns, and how many can be saved up."""
HANGS_S = 0.25
"""A batch this old is raced whatever the budget: there can be few of them in a second."""
PROBE_S = 0.5
"""How often one slow or avoided replica of a group is probed."""
PROBE_ROWS, PROBE_TICK_S = 64, 0.05
"""Rows of a probe at most, and how often it is looked for one that is due."""


@dataclass(slots=True, eq=False)
class Watched:
    """A call that nobody waits for, whose answer is still to teach something.

    seen_s: when it was last seen unanswered; the answer cannot have come sooner.
    """

    peer: Peer
    call: Call
    rows: int
    at_s: float
    seen_s: float
    probe: bool


class Hedging:
    """What all scatters of a dispatcher share of it. after: see `experts.hedge_after`.

    hedges, probes: sent so far. look_for_slow_s: when to ask `to_probe` again. on_silent: told of a peer that has not
    answered for `timeout_s`.
    """

    def __init__(
        self, after: float, transport: Transport, timeout_s: float, on_silent: Callable[[Peer, float], None]
    ) -> None:
        self.hedges = self.probes = 0
        self.look_for_slow_s = 0.0
        self.watched: list[Watched] = []
        self._after = after
        self._transport = transport
        self._timeout_s = timeout_s
        self._on_silent = on_silent
        self._budget = BURST
        self._probe_at_s: dict[str, float] = {}

    def earn(self, batches: int) -> None:
        """So many batches are sent."""
        self._budget = min(BURST, self._budget + EARNED * batches)

    def spend(self, age_s: float) -> bool:
        """Whether a batch that has been away for `age_s` may be raced."""
        if self._budget >= 1.0:
            self._budget -= 1.0
        elif age_s < HANGS_S:
            return False
        return True

    def late_after_s(self, sent: Sent, good: Sequence[Peer]) -> float:
        """Seconds after which `sent` is late; `good`: the peers of its group that could have had it."""
        peer, rows = sent.peer, sent.part.rows
        usual_s = peer.usual_s(0, sent.at_s)  # its rows are among those in flight
        for other in good:
            if other is not peer:
                usual_s = min(usual_s, other.usual_s(rows, sent.at_s))
        return max(FLOOR_S, FLOOR_HOPS * peer.hop_s, self._after * usual_s)

    def watch(self, peer: Peer, call: Call, rows: int, at_s: float, now: float, *, probe: bool) -> None:
        """Nobody waits for `call` any more, but it is to be noticed when it is answered."""
        self._transport.forget(call, watched=True)
        self.watched.append(Watched(peer, call, rows, at_s, now, probe))
        if probe:
            peer.probed = True

    def look(self, now: float) -> None:
        """Learn from the answers that have come, and give up those that are silent for too long."""
        left: list[Watched] = []
        silent: list[Watched] = []
        for each in self.watched:
            if each.call.done:
                self._settle(each, now)
            elif now >= each.at_s + self._timeout_s:
                silent.append(each)
            else:
                each.seen_s = now
                left.append(each)
        self.watched = left
        for each in silent:
            self._end(each)
            self._on_silent(each.peer, now)

    def drop(self, peer: Peer) -> None:
        """Look no more for answers of `peer`: its connection is given up."""
        mine = [each for each in self.watched if each.peer is peer]
        self.watched = [each for each in self.watched if each.peer is not peer]
        for each in mine:
            self._end(each)

    def to_probe(self, peers: Peers, group: str, now: float) -> Peer | None:
        """The peer of `group` that is due for a probe, if any."""
        if now < self._probe_at_s.get(group, 0.0):
            return None
        self._probe_at_s[group] = now + PROBE_S
        ready = peers.ready(group)
        good = peers.good(group, now)
        if len(ready) < 2 or not good:
            return None
        slow = slow_ones(ready) if len(good) > 1 else []  # a single good one is asked anyway
        wanted = [
            peer
            for peer in ready
            if not (peer.late or peer.probed)
            and (now >= peer.retry_at_s if peer.is_avoided(now) else peer in slow and now >= peer.asked_s + PROBE_S)
        ]
        return min(wanted, key=lambda peer: peer.asked_s, default=None)

    def _settle(self, each: Watched, now: float) -> None:
        """An answer, or the end of its connection: that is noticed again by whoever sends there next."""
        peer, call = each.peer, each.call
        if call.error is None:
            # It came at some time between these two. The replica gets the benefit of the doubt.
            least_s = max(each.seen_s - each.at_s, call.compute_s + peer.hop_s)
            peer.caught_up(each.rows, min(now - each.at_s, least_s), call.compute_s, call.queue_rows, now)
        self._end(each)

    def _end(self, each: Watched) -> None:
        self._transport.forget(each.call)
        if each.probe:
            each.peer.probed = False
        else:
            each.peer.late -= 1

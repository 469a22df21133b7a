"""The router's side of a MoE layer: scatter rows over replicas, gather their results, combine them per token.

`Dispatcher` joins the parts: `packing` sorts and sums, `peers` knows the replicas, `scatter` sends and sends again,
a `Transport` carries. Knows no wire format and no directory; the directory's `View` is handed in.
Dimension letters: T tokens, K experts per token, H hidden, R rows (R == T * K).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.fabric.auto import transport_bytes
from cluster.fabric.environment import Buffers, Environment, News
from cluster.fabric.hedging import Hedging
from cluster.fabric.packing import LayerTable, Packed, combine
from cluster.fabric.peers import Peer, Peers
from cluster.fabric.scatter import Scatter
from cluster.fabric.staging import staging_for
from cluster.fabric.transport import Transport
from cluster.membership import Epoch, View
from cluster.placement import Placement

Watch = Callable[[npt.NDArray[np.int64]], None]
"""Told of a MoE layer's rows before they leave: int64 [T, K], the group of each. Must be quick."""
WatchExperts = Callable[[int, npt.NDArray[np.int64]], None]
"""As `Watch`, told of the layer's id and int64 [T, K], the expert of each row; not to be kept."""


@dataclass(slots=True)
class GroupTraffic:
    """Totals of one group.

    wait_s: from the scatter to the group's last row, at most: rows may lie there while the caller works meanwhile.
    critical_s: the part of it really spent waiting, for this group alone, after all other groups had answered.
    """

    rows: int = 0
    wait_s: float = 0.0
    critical_s: float = 0.0


@dataclass(frozen=True)
class ReplicaTraffic:
    """One replica as this router sees it. reason: why its last batch failed or was late, "" if it was neither.

    delay_s: the round trip less computation, smoothed. overtaken: its batches that others were asked for as well.
    """

    group: str
    rows: int
    speed_rows_per_s: float
    hop_s: float
    reason: str
    delay_s: float = 0.0
    overtaken: int = 0


@dataclass(frozen=True)
class DispatchStats:
    """Totals since the start.

    scatters: layers computed. tokens: of all of them together, so that a step of T tokens counts T in each MoE layer,
    of which there are `layers`. scatter_s: from sending rows to having all of them back, of all layers together.
    resends: batches that had to be sent again. replicas: those in the present view, by id. transport_bytes: both
    directions, by name of transport. hedges: late batches sent to a second replica as well. probes: batches sent to a
    slow or avoided replica as well.
    """

    layers: int
    scatters: int
    tokens: int
    resends: int
    groups: dict[str, GroupTraffic]
    replicas: dict[str, ReplicaTraffic]
    transport_bytes: dict[str, int]
    hedges: int = 0
    probes: int = 0
    scatter_s: float = 0.0


class Dispatcher:
    """One per router. `scatter_gather` and what watches belong to one thread; the other methods may be called from any.

    watch, watch_experts: while set, told of every layer. until_s: when nobody wants the results any more, by `clock`;
    experts drop what is late by then.
    """

    def __init__(
        self,
        placement: Placement,
        transport: Transport,
        *,
        wait_s: float,
        timeout_s: float,
        hedge_after: float | None = None,
        on_lost: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        news: News | None = None,
    ) -> None:
        """
        wait_s: how long after their first failure rows wait for a replica.
        timeout_s: silence after which rows are sent to another replica.
        hedge_after: times the usual time after which rows are sent to a second replica as well; None for never.
        on_lost: told the id of a replica that broke or fell silent, in the dispatching thread; must not raise.
        clock, news: time and the wake-up by `update`, for tests.
        """
        self._names = tuple(f"experts-{index}" for index in range(len(placement.groups)))
        self._tables = {layer: LayerTable(owner) for layer, owner in placement.owner.items()}
        self._transport = transport
        self._peers = Peers()
        self._news: News = news or threading.Event()
        self._clock = clock
        self._hedging = None if hedge_after is None else Hedging(hedge_after, transport, timeout_s, self._silent)
        self._environment = Environment(
            names=self._names,
            transport=transport,
            peers=self._peers,
            wait_s=wait_s,
            timeout_s=timeout_s,
            on_lost=on_lost or _ignore,
            clock=clock,
            news=self._news,
            refresh=self._refresh,
            hedging=self._hedging,
        )
        self._use(torch.device("cpu"))
        self.watch: Watch | None = None
        self.watch_experts: WatchExperts | None = None
        self.until_s = float("inf")
        self._loads = {layer: np.zeros(len(owner), dtype=np.int64) for layer, owner in placement.owner.items()}
        self._tokens = 0
        self._traffic = {name: GroupTraffic() for name in self._names}
        self._scatters = self._resends = 0
        self._scatter_s = 0.0
        self._view = View(Epoch("", 0))

    def update(self, view: View) -> None:
        """Take over what the directory says, from the next scatter on; wakes one that waits for a replica."""
        self._view = view
        self._news.set()

    def scatter_gather(
        self,
        layer: int,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """The output of the routed experts of `layer`: [T, H] in the dtype and on the device of `hidden` [T, H].

        index: integers [T, K], the experts of each token. weight: [T, K], in the dtype in which to weight.
        meanwhile: work of the caller's own that needs no result, done while the rows are away.

        Raises:
            ExpertsUnavailableError: a group had no usable replica for `wait_s`; names the group and the reasons.
            EngineError: a replica and then another, or the same again, failed to compute their rows.
            DeadlineError: `until_s` came before all results.
        """
        if hidden.device != self._device:
            self._use(hidden.device)
        host_hidden, host_index = self._staging.leave(hidden, index)
        table = self._tables[layer]
        packed = table.pack(host_index)
        if self.watch is not None:
            self.watch(table.groups_of(host_index))
        if self.watch_experts is not None:
            self.watch_experts(layer, host_index.numpy())
        self._refresh()
        scatter = Scatter(
            self._environment,
            layer,
            host_hidden,
            packed,
            self._buffers,
            turn=self._scatters,
            until_s=self.until_s,
        )
        start_s = self._clock()
        try:
            scatter.run(meanwhile)
        finally:
            self._scatters += 1
            self._scatter_s += self._clock() - start_s
            self._resends += scatter.resends
        self._tokens += hidden.shape[0]
        self._loads[layer] += packed.counts
        self._count(packed, scatter, start_s)
        return combine(self._staging.arrive(self._buffers.results.rows(packed.order)), weight, hidden.dtype)

    def stats(self) -> DispatchStats:
        """A copy, plain data."""
        return DispatchStats(
            layers=len(self._tables),
            scatters=self._scatters,
            tokens=self._tokens,
            resends=self._resends,
            groups={name: replace(traffic) for name, traffic in self._traffic.items()},
            replicas={
                name: ReplicaTraffic(
                    peer.replica.group,
                    peer.rows,
                    peer.speed_rows_per_s,
                    peer.hop_s,
                    peer.reason,
                    peer.delay_s,
                    peer.overtaken,
                )
                for name, peer in self._peers.by_id.items()
            },
            transport_bytes=transport_bytes(self._transport),
            hedges=0 if self._hedging is None else self._hedging.hedges,
            probes=0 if self._hedging is None else self._hedging.probes,
            scatter_s=self._scatter_s,
        )

    def loads(self) -> dict[int, npt.NDArray[np.int64]]:
        """Layer -> int64 [E], rows of each expert since the start, by expert id; of scatters that succeeded. A copy."""
        return {layer: self._tables[layer].by_expert(counts) for layer, counts in self._loads.items()}

    def _use(self, device: torch.device) -> None:
        """Rows come from `device` from now on."""
        self._device = device
        self._staging = staging_for(device)
        self._buffers = Buffers(self._staging.memory)

    def _silent(self, peer: Peer, now: float) -> None:
        self._environment.give_up(peer, now)

    def _refresh(self) -> None:
        if self._peers.adopt(self._view):
            self._transport.retain(self._peers.by_id)

    def _count(self, packed: Packed, scatter: Scatter, start_s: float) -> None:
        """Groups answered in order of time, so the last one was waited for alone after the one before it."""
        for rows in packed.groups:
            self._traffic[self._names[rows.group]].rows += rows.stop - rows.start
        answered = scatter.answered
        before_s = max(start_s, scatter.free_s)
        for position, (group, at_s) in enumerate(answered, start=1):
            traffic = self._traffic[self._names[group]]
            traffic.wait_s += at_s - start_s
            if position == len(answered):
                traffic.critical_s += at_s - before_s
            before_s = at_s


def _ignore(replica_id: str) -> None:
    """Nobody wants to know."""

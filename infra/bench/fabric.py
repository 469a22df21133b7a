"""Scatter and gather of one layer, experts excluded: against bare sockets, and against what one would write first.

4 groups in 4 processes, 16 experts, top-2, float32, one replica a group. Measured in turn, each sample a mean over many
calls:

    floor       the bytes of every group's rows through bare sockets, there and back (`floor`)
    transport   Transport.send of what the dispatcher would send, and wait until all results are in memory. Rows are
                taken out of the hidden states once, before the first call: that is a part of `whole` alone
    whole       Dispatcher.scatter_gather
    plain       pack and combine as one writes them in torch, nothing sent
    around      the same with the floor's ping-pong between the two: after a wait the processor has forgotten their
                code, and they take several times as long as in a loop of their own

Then, with Ray up, `whole` once more beside actor calls and Serve handles (`ray_baselines`), which get their rows packed
and do not combine. Rows and experts are random with a fixed seed.

The floor bounds what goes through sockets. From some MB a layer on, where copies are all there is, a fabric that copies
less, by memory shared with the replica, may pass below it.
Dimension letters: T tokens, K experts per token, H hidden, R rows (R == T * K).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cluster.errors import FabricError
from cluster.fabric.links import StreamCall
from cluster.fabric.stream import StreamTransport
from cluster.fabric.transport import Batch, Call
from cluster.membership import Replica, View
from infra.bench.context import Context
from infra.bench.expert_processes import (
    DIGEST,
    EXPERTS,
    GROUPS,
    KEY,
    NODE,
    WIDTHS,
    ExpertProcesses,
    new_dispatcher,
    new_stream,
)
from infra.bench.figures import Figure, compared
from infra.bench.floor import Floor
from infra.bench.measure import Samples, alternate

PER_TOKEN = 2
TOKENS = (1, 8, 32, 256, 2048)
PROMISED_TOKENS = (8, 32)
"""Decode sizes, for which there are targets."""
TRANSPORT_TARGET, WHOLE_TARGET, PLAIN_SHARE = 1.5, 1.0, 2.0
ACTORS_TARGET, HANDLES_TARGET = 10.0, 30.0
ROUNDS, RAY_ROUNDS = 11, 7
CALLS, SAMPLE_BYTES = 200, 64 << 20
"""Calls of a sample, fewer where they would move more bytes than these."""
RAY_CALLS, STORE_BYTES = 10, 100 << 20
SEED = 5
"""One with which all groups get about as many rows at the promised sizes."""
WAIT_S = 30.0


@dataclass(frozen=True)
class LayerInput:
    """What a router hands over: hidden [T, H], index [T, K], weight [T, K]; `layer` is the one with rows of H."""

    layer: int
    hidden: Tensor
    index: Tensor
    weight: Tensor

    @property
    def name(self) -> str:
        """The case in the table."""
        return f"T={self.hidden.shape[0]} H={self.hidden.shape[1]}"

    @property
    def calls(self) -> int:
        """Calls of one sample."""
        size = self.index.numel() * self.hidden.shape[1] * self.hidden.itemsize
        return max(3, min(CALLS, SAMPLE_BYTES // size))


def layer_input(tokens: int, layer: int, per_token: int = PER_TOKEN) -> LayerInput:
    """A random layer input of `tokens` tokens, each with `per_token` different experts."""
    generator = torch.Generator().manual_seed(SEED)
    # First, so that rows of any width go to the same experts.
    weight, index = torch.rand(tokens, EXPERTS, generator=generator).softmax(-1).topk(per_token)
    return LayerInput(layer, torch.randn(tokens, WIDTHS[layer], generator=generator), index, weight)


def pack(given: LayerInput) -> tuple[Tensor, Tensor, Tensor]:
    """(order [R], counts [E], rows [R, H]) sorted by expert, which is by group too as groups are neighbours."""
    experts = given.index.reshape(-1)
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=EXPERTS)
    return order, counts, given.hidden.index_select(0, order // given.index.shape[1])


def rows_by_group(given: LayerInput) -> list[Tensor]:
    """The rows of every group, some of them none."""
    _, counts, rows = pack(given)
    return list(torch.split_with_sizes(rows, counts.view(GROUPS, -1).sum(1).tolist()))


def combine(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """Sorted rows [R, H] back to their places, weighted and summed: [T, H]."""
    back = torch.empty_like(rows).index_copy_(0, order, rows)
    return (back * weight.reshape(-1, 1)).view(*weight.shape, rows.shape[1]).sum(1)


def run(context: Context) -> Iterable[Figure]:
    """Every size without Ray, then those with targets beside Ray, whose processes are never quite idle."""
    figures: list[Figure] = []
    sizes = [(8, 0)] if context.smoke else [(tokens, layer) for layer in range(len(WIDTHS)) for tokens in TOKENS]
    with (
        torch.inference_mode(),
        ExpertProcesses() as processes,
        Floor(processes.floor_paths) as floor,
        closing(new_stream()) as stream,
    ):
        ours = Ours(stream, processes.view)
        for tokens, layer in sizes:
            given = layer_input(tokens, layer)
            context.progress(f"fabric: {given.name}")
            figures += _against_floor(given, ours, processes.view, floor, rounds=context.rounds(ROUNDS))
        if not context.smoke:
            context.progress("fabric: starting Ray and Serve for what one would write first")
            promised = [layer_input(tokens, layer) for layer in range(len(WIDTHS)) for tokens in PROMISED_TOKENS]
            figures += _against_ray(promised, ours, context)
    return figures


class Ours:
    """The project's fabric over one set of connections, as a router has them."""

    def __init__(self, stream: StreamTransport, view: View) -> None:
        self._stream = stream
        self._dispatcher = new_dispatcher(stream, view)

    def whole(self, given: LayerInput) -> Tensor:
        """Scatter, gather, combine: [T, H]."""
        return self._dispatcher.scatter_gather(given.layer, given.hidden, given.index, given.weight)

    @property
    def bytes_moved(self) -> int:
        """Both ways, so far."""
        return self._stream.bytes_sent + self._stream.bytes_received

    def transport_alone(self, sent: Sequence[tuple[Replica, Batch]]) -> None:
        """Send every batch, wait for all results."""
        calls: list[Call] = [self._stream.send(replica, batch, WAIT_S) for replica, batch in sent]
        while calls:
            done = self._stream.wait(calls, WAIT_S)
            if not done or any(call.error for call in done):
                raise FabricError(f"an expert process fell silent or failed: {[str(call.error) for call in done]}")
            calls = [call for call in calls if not call.done]


class Recorder(StreamTransport):
    """A stream that keeps what it was given to send."""

    def __init__(self) -> None:
        super().__init__(key=KEY, digest=DIGEST, node_id=NODE)
        self.sent: list[tuple[Replica, Batch]] = []

    def send(self, replica: Replica, batch: Batch, deadline_s: float) -> StreamCall:
        """As the stream does."""
        self.sent.append((replica, batch))
        return super().send(replica, batch, deadline_s)


def sent_for(given: LayerInput, view: View) -> list[tuple[Replica, Batch]]:
    """What a dispatcher hands to its transport; one of its own, so that nothing changes these batches any more."""
    with closing(Recorder()) as recorder:
        new_dispatcher(recorder, view).scatter_gather(given.layer, given.hidden, given.index, given.weight)
    return recorder.sent


def _against_floor(given: LayerInput, ours: Ours, view: View, floor: Floor, *, rounds: int) -> list[Figure]:
    sent = sent_for(given, view)
    sizes = [rows.nbytes for rows in rows_by_group(given)]

    def plain() -> Tensor:
        order, _, rows = pack(given)
        return combine(rows, order, given.weight)

    def around_floor() -> Tensor:
        order, _, rows = pack(given)
        floor.ping_pong()
        return combine(rows, order, given.weight)

    def with_floor(call: Callable[[], object]) -> float:
        floor.start(sizes, given.calls)
        return mean_us(call, given.calls)

    torch.testing.assert_close(ours.whole(given), plain())
    moved = ours.bytes_moved
    ours.transport_alone(sent)
    if ours.bytes_moved - moved < 2 * sum(sizes):
        raise FabricError("the transport moved fewer bytes than the floor does.")
    taken = alternate(
        {
            "floor": partial(with_floor, floor.ping_pong),
            "transport": partial(mean_us, partial(ours.transport_alone, sent), given.calls),
            "whole": partial(mean_us, partial(ours.whole, given), given.calls),
            "plain": partial(mean_us, plain, given.calls),
            "around": partial(with_floor, around_floor),
        },
        rounds=rounds,
    )
    return _figures(given, taken)


def _against_ray(inputs: Sequence[LayerInput], ours: Ours, context: Context) -> list[Figure]:
    # Imported here: it takes seconds, and a smoke run does without.
    from infra.bench import ray_baselines

    figures = []
    with ray_baselines.ray_cluster(store_bytes=STORE_BYTES), ray_baselines.serve_handles(GROUPS) as handles:
        actors = ray_baselines.actor_calls(GROUPS)
        for given in inputs:
            context.progress(f"fabric: {given.name} beside actor calls and Serve handles")
            rows = {group: part.numpy() for group, part in enumerate(rows_by_group(given)) if len(part)}
            for exchange in (actors, handles):
                np.testing.assert_equal(exchange(rows), list(rows.values()))
            taken = alternate(
                {
                    "whole": partial(mean_us, partial(ours.whole, given), given.calls),
                    "actor calls": partial(mean_us, partial(actors, rows), RAY_CALLS),
                    "Serve handles": partial(mean_us, partial(handles, rows), RAY_CALLS),
                },
                rounds=RAY_ROUNDS,
            )
            figures += [
                compared(
                    "fabric",
                    given.name,
                    what,
                    taken[what],
                    "whole scatter + gather",
                    taken["whole"],
                    unit="us",
                    target=target,
                    at_most=False,
                )
                for what, target in (("actor calls", ACTORS_TARGET), ("Serve handles", HANDLES_TARGET))
            ]
    return figures


def _figures(given: LayerInput, taken: dict[str, Samples]) -> list[Figure]:
    promised = given.hidden.shape[0] in PROMISED_TOKENS
    pairs = zip(taken["floor"].values, taken["plain"].values, strict=True)
    allowed = Samples(tuple(floor + PLAIN_SHARE * plain for floor, plain in pairs))

    def figure(what: str, side: str, against: str, reference: Samples, target: float | None) -> Figure:
        return compared(
            "fabric",
            given.name,
            what,
            taken[side],
            against,
            reference,
            unit="us",
            target=target if promised else None,
        )

    return [
        figure("transport alone", "transport", "bare sockets", taken["floor"], TRANSPORT_TARGET),
        figure("whole scatter + gather", "whole", "sockets + 2 x plain pack, combine", allowed, WHOLE_TARGET),
        figure("whole scatter + gather", "whole", "plain pack, sockets, plain combine", taken["around"], None),
        figure("plain pack + combine", "plain", "bare sockets", taken["floor"], None),
    ]


def mean_us(call: Callable[[], object], calls: int) -> float:
    """Microseconds a call, over `calls` of them."""
    begun_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun_s) / calls * 1e6

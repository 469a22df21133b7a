"""What a token costs on the network, and what a decode step is expected to take. Pure.

A step's time is a sum of four parts, because nothing overlaps in the worst case:

    router    computed   its weights and the keys and values of all sequences, read once, by the bandwidth of its device
    experts   computed   in every layer the slowest group: experts that somebody names, by the bandwidth of its devices
    network   computed   rows out and back, by the bandwidth of the router's link
    hops      measured   what scatter and gather cost beside their bytes (measured.py: on a CPU, on one machine)

Missing, because nothing was measured: kernel launches and the Python between them, copies between a GPU and its host,
prefill. No device reaches its data sheet's bandwidth. So this is a floor for the GPU's part and a guess for the hops.
Dimension letters: S sequences, K experts per token, E experts of a layer, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fabric.frames import HEADER_BYTES
from cluster.placement import Experts
from cluster.sizing.measured import hop_s
from cluster.sizing.memory import kv_token_bytes
from cluster.sizing.shape import Shape

COUNT_BYTES = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes between a router and the experts by the `stream` transport.

    out_bytes, back_bytes: rows of one token and layer. batch_bytes: beside the rows of one batch to one group, both
    ways, without the `COUNT_BYTES` for each of its experts.
    """

    out_bytes: int
    back_bytes: int
    batch_bytes: int = 2 * HEADER_BYTES

    @property
    def token_layer_bytes(self) -> int:
        """Both ways."""
        return self.out_bytes + self.back_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a decode step of so many sequences; None where a device's bandwidth is unknown."""

    sequences: int
    router_s: float | None
    experts_s: float | None
    network_s: float
    hops_s: float

    @property
    def total_s(self) -> float | None:
        """All four parts, one after the other."""
        if self.router_s is None or self.experts_s is None:
            return None
        return self.router_s + self.experts_s + self.network_s + self.hops_s

    @property
    def tokens_per_s(self) -> float | None:
        """Of one router."""
        return None if self.total_s is None else self.sequences / self.total_s


@dataclass(frozen=True)
class Reading:
    """What a step reads from memory, where: bytes a second of the router's device, and of each group's together."""

    router: float | None
    groups: tuple[float | None, ...]


def traffic(shape: Shape) -> Traffic:
    """A row is H numbers, and a token sends one to each of its K experts, wherever they are: 8 x 7168 x 2 both ways."""
    rows = shape.top_k * shape.hidden * shape.item_bytes
    return Traffic(out_bytes=rows, back_bytes=rows)


def step_time(
    shape: Shape,
    groups: Sequence[Experts],
    reading: Reading,
    *,
    sequences: int,
    context_tokens: int,
    link: float,
) -> StepTime:
    """A decode step of `sequences` whose contexts are `context_tokens` long. link: bytes a second, each way."""
    layers = len(shape.experts)
    batches = len(groups) * traffic(shape).batch_bytes + COUNT_BYTES * max(shape.experts.values())
    return StepTime(
        sequences=sequences,
        router_s=None if reading.router is None else _router_bytes(shape, sequences, context_tokens) / reading.router,
        experts_s=_experts_s(shape, groups, reading, sequences),
        network_s=layers * (sequences * traffic(shape).token_layer_bytes + batches) / link,
        hops_s=layers * hop_s(len(groups)),
    )


def named_share(shape: Shape, layer: int, sequences: int) -> float:
    """The expected share of a layer's experts that somebody names, where all are named equally often.

    8 of 256, 32 sequences: 1 - (1 - 1/32) ** 32 = 0.64.
    """
    return 1.0 - (1.0 - min(1.0, shape.top_k / shape.experts[layer])) ** sequences


def _router_bytes(shape: Shape, sequences: int, context_tokens: int) -> float:
    weights = (shape.router_numbers - shape.embedding_numbers) * shape.item_bytes
    return weights + sequences * context_tokens * kv_token_bytes(shape)


def _experts_s(shape: Shape, groups: Sequence[Experts], reading: Reading, sequences: int) -> float | None:
    """A group that is reached reads one expert at least."""
    seconds = 0.0
    for layer in shape.experts:
        share, slowest = named_share(shape, layer, sequences), 0.0
        for group, bandwidth in zip(groups, reading.groups, strict=True):
            if bandwidth is None:
                return None
            if held := len(group.get(layer, ())):
                read = max(1.0, held * share) * shape.expert_numbers[layer] * shape.item_bytes
                slowest = max(slowest, read / bandwidth)
        seconds += slowest
    return seconds

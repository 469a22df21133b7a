"""Bytes on a device: a router's weights, keys and values, and what a step needs beside them; an expert replica's.

Weights and the KV pool are exact: the tests hold them against a loaded router. What a step needs beside them is an
estimate from above that adds up what the router's code keeps alive at once; the tests hold it against steps of small
models on the CPU, which took 0.4 to 0.7 of it. `RESERVE` is an assumption. Pure.
Dimension letters: T tokens of a step, S sequences, K experts per token, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.sizing.shape import Shape

PAGE_TOKENS = 16
SPARE_PAGES = 2
"""As in the router: its pages, and the null and spill pages that every pool has beside those asked for."""
RESERVE = 0.1
"""Share of a device's memory left to its driver, to kernels and to gaps between tensors. Assumed, not measured."""
ALIVE = 4
"""So many of a token's hidden states and widest values are alive at once: input, gate, up, their product."""


@dataclass(frozen=True)
class Work:
    """What a router is asked to run at once: `router.max_batch_tokens`, `max_sequences`, `kv_tokens`, `replicas`."""

    batch_tokens: int = 512
    sequences: int = 64
    kv_tokens: int = 32768
    routers: int = 1


@dataclass(frozen=True)
class RouterMemory:
    """Bytes of one router on its device."""

    weights_bytes: int
    kv_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_bytes + self.step_bytes


def kv_token_bytes(shape: Shape) -> int:
    """Bytes one token takes in the KV pool, all layers together."""
    return sum(shape.kv_numbers.values()) * shape.item_bytes


def router_memory(shape: Shape, work: Work) -> RouterMemory:
    """What one router needs."""
    slots = (work.kv_tokens // PAGE_TOKENS + SPARE_PAGES) * PAGE_TOKENS
    return RouterMemory(
        weights_bytes=shape.router_numbers * shape.item_bytes,
        kv_bytes=slots * kv_token_bytes(shape),
        step_bytes=_router_step_bytes(shape, work),
    )


def tokens_that_fit(shape: Shape, work: Work, room: float) -> int:
    """The most `kv_tokens` with which a router fits into `room` bytes, at least; 0 where it does not in any case.

    A token costs its place in the pool and what a step makes of it, which grows no more beyond the longest context:
    there more tokens than these may fit.
    """
    empty = router_memory(shape, replace(work, kv_tokens=0)).total_bytes
    step_numbers = 2 * max(shape.kv_numbers.values()) + shape.expanded_numbers + work.batch_tokens
    each = kv_token_bytes(shape) + step_numbers * shape.item_bytes
    return max(0, int((room - empty) // (each * PAGE_TOKENS))) * PAGE_TOKENS


def _router_step_bytes(shape: Shape, work: Work) -> int:
    item = shape.item_bytes
    between = work.batch_tokens * ALIVE * (shape.hidden + shape.widest) * item
    # Rows come back in the model's arithmetic and are weighted in float32.
    rows = work.batch_tokens * shape.top_k * shape.hidden * (item + 4)
    # The model's own, a float32 copy, and one that the sampler works on.
    logits = work.sequences * shape.vocabulary * (item + 2 * 4)
    # A layer's keys and values are gathered before attention; buckets pad that to at most twice its size.
    gathered = 2 * work.kv_tokens * max(shape.kv_numbers.values()) * item
    # The last chunk of the longest prompt: its latents expanded, and a mask over them.
    longest = min(work.kv_tokens, shape.max_context)
    chunk = longest * (shape.expanded_numbers + work.batch_tokens) * item
    return between + rows + logits + gathered + chunk


def replica_step_bytes(shape: Shape, work: Work) -> int:
    """What an expert replica needs beside its weights, where all rows of all routers come to it: the worst case."""
    rows = work.routers * work.batch_tokens * shape.top_k
    return rows * (2 * shape.hidden + ALIVE * shape.expert_widest) * shape.item_bytes

"""How long a step takes: engines in lock step with the slowest group of every layer. Pure.

An *engine* runs steps: a router in ExpertScale, a whole-model replica in the baseline. Dimensions: D domains, P layer
patterns, G groups; K = D + 1 phases: a step with a prompt of domain d, and one that only decodes.

    step = step_s + token_s * tokens / backbones + sum over layers of (hop_s + max over groups of wait)
    alone:   wait_g = S_g = (rows_g + call_rows) / capacity_g
    shared:  R routers meet at the groups. wait_g = S_g * f_g, where f_g solves the mean-value
             equation of one processor-sharing station in a closed cycle, Schweitzer's form ("Approximate analysis of
             multiclass closed networks of queues", 1979): with Z the rest of a layer's cycle and S the service time,
             W = S (1 + (R - 1) W / (Z + W)), so W = ((S R - Z) + sqrt((S R - Z)^2 + 4 S Z)) / 2 and f = W / S.

R = 1 gives W = S; many routers give W = S R - Z, that is a cycle of S R: the group is busy all the time. For instance
S = 2 ms, Z = 8 ms, R = 4: W = sqrt(64) / 2 = 4 ms, a cycle of 12 ms, 67 % busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """How engines use devices.

    shared: the groups' replicas serve all engines (ExpertScale); else each engine has one device per group of its own.
    call_rows: what reading a group's weights takes, once for each batch, in rows; replicas share it as they share the
    rows (each is sent some of the experts). backbones: devices that share the
    backbone's work of one engine. top_k, layers: as in the scenario.
    """

    shared: bool
    shares: Floats
    layers: int
    top_k: int
    step_s: float
    token_s: float
    hop_s: float
    call_rows: float
    backbones: int
    max_sequences: int
    max_batch_tokens: int


@dataclass(frozen=True)
class Steps:
    """The steps of one moment. step_s[K]. In one layer of each pattern: alone_s[K, P, G] computing, wait_s[K, P, G]
    with the computing for other engines, without the hop. chunk_tokens: of a prompt in each step that has one."""

    step_s: Floats
    alone_s: Floats
    wait_s: Floats
    chunk_tokens: float


@dataclass(frozen=True)
class Moment:
    """What the engines have to do now.

    engines: those that are ready. capacity[G]: rows/s of a group, for all engines or for one (`Layout.shared`).
    decoding: sequences. decode_mix[D], prompt_mix[D]: shares of the domains. phase_share[K]: of the engines' time
    in the last tick. active: mean number of engines that ran a step. own: part of a chunk that is of a single domain.
    """

    engines: int
    capacity: Floats
    decoding: int
    decode_mix: Floats
    prompt_mix: Floats
    phase_share: Floats
    active: float
    own: float


class StepModel:
    """The equations above for one layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.domains, self.patterns, self.groups = layout.shares.shape
        self._flat = layout.shares.reshape(self.domains, -1)
        self.layers_per_pattern = layout.layers / self.patterns

    def at(self, now: Moment) -> Steps:
        """The step times now. An engine decodes its part of all sequences; idle engines decode none."""
        layout = self.layout
        per_engine = now.decoding / min(now.engines, now.decoding) if now.decoding else 0.0
        chunk = max(layout.max_batch_tokens - per_engine, 1.0)
        alone = wait = self._service(now, per_engine, chunk)
        tokens = np.full(self.domains + 1, per_engine)
        tokens[:-1] += chunk
        rest = layout.step_s + layout.token_s * tokens / layout.backbones + layout.layers * layout.hop_s
        if layout.shared and now.active > 1:
            wait = alone * self._crowding(alone, rest, now)
        step_s = rest + self.layers_per_pattern * wait.max(axis=2).sum(axis=1)
        return Steps(step_s, alone, wait, chunk)

    def _service(self, now: Moment, per_engine: float, chunk: float) -> Floats:
        """[K, P, G]: seconds each group computes for one engine's rows of one layer, alone."""
        top_k = self.layout.top_k
        decode, mixed = np.stack([now.decode_mix, now.prompt_mix]) @ self._flat
        rows = np.empty((self.domains + 1, self._flat.shape[1]))
        rows[:-1] = self._flat * (top_k * chunk * now.own)
        rows[:-1] += mixed * (top_k * chunk * (1 - now.own))
        rows[-1] = 0.0
        rows += decode * (top_k * per_engine) + self.layout.call_rows
        service: Floats = rows.reshape(-1, self.patterns, self.groups) / now.capacity
        return service

    def _crowding(self, service: Floats, rest: Floats, now: Moment) -> Floats:
        """[P, G]: how many times longer rows take because other engines use the groups too."""
        weight = now.phase_share / max(now.phase_share.sum(), 1e-12)
        mean = np.tensordot(weight, service, axes=1)
        think = float(weight @ rest) / self.layout.layers
        half = (mean * now.active - think) / 2
        wait = half + np.sqrt(half * half + mean * think)
        # All groups have one cycle, that of the slowest: the others are less crowded than alone with the engines.
        cycle = think + wait.max(axis=1, keepdims=True)
        busy_by_others = np.minimum((now.active - 1) * mean / cycle, 1 - 1e-9)
        crowding: Floats = 1 / (1 - busy_by_others)
        return crowding

"""Which experts the tokens of a request went to, for requests that ask; steps without one are not watched.

Knows no transport, no experts and no clock. Tokens found in the pool are not computed, and nothing is known of theirs.
Dimension letters: T tokens, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cluster.fabric.dispatch import WatchExperts
    from deployments.router.scheduler import Plan
    from deployments.router.sequence import Sequence
    from deployments.router.step import SequenceSlice


class Watchable(Protocol):
    """What is watched: a `Dispatcher`."""

    watch_experts: WatchExperts | None


class ExpertRecord:
    """Attributes experts to sequences. For the engine's thread.

        begin(plan)    the step is about to run; a step that fails is forgotten by the next `begin`
        end(plan)      it has succeeded

    A sequence keeps what it used until its next chunk takes it. What is computed again after a preemption counts again.
    """

    def __init__(self, dispatcher: Watchable) -> None:
        self._dispatcher = dispatcher
        self._asked: list[tuple[Sequence, SequenceSlice]] = []
        self._used: list[dict[int, set[int]]] = []

    def begin(self, plan: Plan) -> None:
        """Watch the step, if somebody asked."""
        self._asked = [
            pair for pair in zip(plan.sequences, plan.step.slices, strict=True) if pair[0].request.show_experts
        ]
        self._used = [{} for _ in self._asked]
        self._dispatcher.watch_experts = self._see if self._asked else None

    def end(self, plan: Plan) -> None:  # noqa: ARG002 - as of `RoutingRecord`
        """Say to the sequences of the step what they have used."""
        if not self._asked:
            return
        self._dispatcher.watch_experts = None
        for (sequence, _), used in zip(self._asked, self._used, strict=True):
            for layer, experts in used.items():
                sequence.experts.setdefault(layer, set()).update(experts)

    def _see(self, layer: int, index: npt.NDArray[np.int64]) -> None:
        """index: [T, K], the experts of the rows of `layer`."""
        for (_, part), used in zip(self._asked, self._used, strict=True):
            rows = index[part.start : part.start + part.length]
            used.setdefault(layer, set()).update(np.unique(rows).tolist())

"""Which expert groups the prompts of a router use, shown by their prefill: what their decode steps will ask for.

A prompt keeps to its subject, so the experts its tokens went to are the best guess at those of its answer. Steps that
compute parts of prompts are watched, layer by layer; pure decode steps are not, and cost nothing here.
Knows no transport, no experts and no clock. Dimension letters: T tokens, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cluster.fabric.dispatch import Watch
    from deployments.router.scheduler import Plan
    from deployments.router.sequence import Sequence


class Shown(NamedTuple):
    """rows: int64 [G], of all MoE layers together, to which `tokens` computed tokens of one prompt went."""

    rows: npt.NDArray[np.int64]
    tokens: int


class Watchable(Protocol):
    """What is watched: a `Dispatcher`."""

    watch: Watch | None


class RoutingRecord:
    """Attributes rows to prompts. For the engine's thread.

        begin(plan)    the step is about to run; a step that fails is forgotten by the next `begin`
        end(plan)      it has succeeded

    What a sequence has shown survives a preemption; what it then computes again counts again, rows and tokens alike.
    Tokens found in the pool show nothing.
    """

    def __init__(self, dispatcher: Watchable, groups: int) -> None:
        self._dispatcher = dispatcher
        self._groups = groups
        # [T, 1]: where in `_rows` each token's groups begin. A stretch of G for every chunk, one more for other tokens.
        self._offset = np.empty((0, 1), dtype=np.int64)
        self._rows = np.empty(0, dtype=np.int64)

    def begin(self, plan: Plan) -> None:
        """Watch the step, if it computes a part of a prompt."""
        if not plan.chunks:
            self._dispatcher.watch = None
            return
        rest = len(plan.chunks) * self._groups
        self._offset = np.full((len(plan.step.tokens), 1), rest, dtype=np.int64)
        for number, chunk in enumerate(plan.chunks):
            part = plan.step.slices[chunk]
            self._offset[part.start : part.start + part.length] = number * self._groups
        self._rows = np.zeros(rest + self._groups, dtype=np.int64)
        self._dispatcher.watch = self._see

    def end(self, plan: Plan) -> None:
        """Say to the sequences of the step what they have shown."""
        if not plan.chunks:
            return
        self._dispatcher.watch = None
        for chunk, rows in zip(plan.chunks, self._rows.reshape(-1, self._groups), strict=False):
            sequence, tokens = plan.sequences[chunk], plan.step.slices[chunk].length
            if sequence.shown is not None:
                # Never changed in place: another thread may be reading it.
                rows, tokens = rows + sequence.shown.rows, tokens + sequence.shown.tokens
            sequence.shown = Shown(rows, tokens)

    def _see(self, groups: npt.NDArray[np.int64]) -> None:
        """groups: [T, K], of the rows of one layer."""
        self._rows += np.bincount((self._offset + groups).reshape(-1), minlength=len(self._rows))


def coming(sequences: Iterable[Sequence], mix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[G], the rows of all MoE layers together that one decode step more of each of `sequences` brings.

    mix: [G], the same of a token nobody knows anything of. A choice that waits for the leader's prompt uses that.
    """
    total = np.zeros(len(mix))
    for sequence in sequences:
        shown = sequence.shown or (sequence.leader.shown if sequence.leader is not None else None)
        total += mix if shown is None else shown.rows / shown.tokens
    return total

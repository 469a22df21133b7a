"""Which tokens of which sequences make up the next step: continuous batching with chunked prefill.

Decode rows come first, the rest of the token budget goes to prompts in order of arrival, in chunks. A sequence is
admitted when the pool has the pages of all its tokens, and one to spare while others run. When a decode row finds
the pool full, the youngest running sequence gives up its pages and is recomputed later (preemption by recompute), so
the oldest always advances. Iteration-level scheduling after Orca, chunked prefill after Sarathi-Serve, paging after
vLLM. Knows no torch, no clock, no sampling, no threads.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from deployments.router.page_pool import PagePool
from deployments.router.sequence import Sequence
from deployments.router.step import SequenceSlice, StepInput


@dataclass(frozen=True)
class Plan:
    """One step: what the model gets, whose slices they are, and whose logits come back, row by row.

    chunks: which of the slices are parts of prompts, not decode rows.
    prefill_tokens: the tokens of the step that are not the last ones sampled, those of the chunks.
    """

    step: StepInput
    sequences: list[Sequence]
    sampled: list[Sequence]
    chunks: list[int]
    prefill_tokens: int


class Scheduler:
    """Sequences waiting and running, each list oldest first, and the pages they hold.

    max_batch_tokens: tokens of one step. max_sequences: running at once; at most `max_batch_tokens`.
    preemptions: how often a running sequence had to give up its pages.
    """

    def __init__(self, pool: PagePool, *, max_batch_tokens: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(f"max_sequences ({max_sequences}) must be 1 to max_batch_tokens ({max_batch_tokens})")
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence by its order of arrival."""
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Drop a sequence, finished or not, and free its pages; `forget` keeps their content from being reused."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._free(sequence, forget=forget)

    def schedule(self) -> Plan:
        """The next step. Empty only if nothing is queued or running."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.pages and self._make_room(sequence):
                chunks.append((sequence, 1))
        budget = self._max_batch_tokens - len(chunks)
        for sequence in self.running:
            if sequence.remaining > 1 and budget:
                chunks.append((sequence, min(budget, sequence.remaining)))
                budget -= chunks[-1][1]
        while budget and (admitted := self._admit_next()):
            chunks.append((admitted, min(budget, admitted.remaining)))
            budget -= chunks[-1][1]
        chunks.sort(key=lambda chunk: chunk[1] != 1)
        return _pack(chunks)

    def advance(self, plan: Plan) -> None:
        """Record that the step ran: its tokens are computed, and pages it filled can be reused by others."""
        for sequence, part in zip(plan.sequences, plan.step.slices, strict=True):
            full_before = sequence.computed // self.pool.page_tokens
            sequence.computed = part.context_tokens
            full = sequence.computed // self.pool.page_tokens
            if full > full_before:
                digests = sequence.digests_of(full, self.pool.page_tokens)
                for index in range(full_before, full):
                    self.pool.publish(sequence.pages[index], digests[index])

    def _make_room(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the page of its next token; False if it was the youngest and had to go itself.

        Decode rows are visited oldest first, so the youngest running sequence is never one already in the step.
        """
        if len(sequence.tokens) <= len(sequence.pages) * self.pool.page_tokens:
            return True
        while not self.pool.available:
            youngest = self.running.pop()
            self._free(youngest)
            self.add(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        sequence.pages += self.pool.allocate(1)
        return True

    def _admit_next(self) -> Sequence | None:
        """Move the oldest waiting sequence to the running ones if it may start; it never jumps the queue."""
        sequence = next((s for s in self.waiting if not s.held), None)
        if sequence is None or len(self.running) >= self._max_sequences or not self._take_pages(sequence):
            return None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.arrival)
        return sequence

    def _take_pages(self, sequence: Sequence) -> bool:
        # The last token is always computed, since its logits are needed: never look for a page that ends with it.
        reusable = (len(sequence.tokens) - 1) // self.pool.page_tokens
        shared = self.pool.match(sequence.digests_of(reusable, self.pool.page_tokens))
        fresh = self.pool.pages_for(len(sequence.tokens)) - len(shared)
        to_spare = 1 if self.running else 0
        if fresh + self.pool.unheld(shared) + to_spare > self.pool.available:
            return False
        self.pool.acquire(shared)
        sequence.pages = shared + self.pool.allocate(fresh)
        sequence.computed = len(shared) * self.pool.page_tokens
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached_tokens = min(sequence.computed, sequence.request.prompt_tokens)
        return True

    def _free(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.pool.release(sequence.pages, forget=forget)
        sequence.pages = []
        sequence.computed = 0


def _pack(chunks: list[tuple[Sequence, int]]) -> Plan:
    tokens: list[int] = []
    positions: list[int] = []
    slices: list[SequenceSlice] = []
    logits_rows: list[int] = []
    sampled: list[Sequence] = []
    for sequence, length in chunks:
        end = sequence.computed + length
        slices.append(SequenceSlice(len(tokens), length, end, sequence.pages))
        tokens += sequence.tokens[sequence.computed : end]
        positions += range(sequence.computed, end)
        if end == len(sequence.tokens):
            logits_rows.append(len(tokens) - 1)
            sampled.append(sequence)
    sequences = [sequence for sequence, _ in chunks]
    prefills = [i for i, s in enumerate(sequences) if not len(s.request.tokens) <= s.computed == len(s.tokens) - 1]
    prefill_tokens = len(tokens) - len(sequences) + len(prefills)
    return Plan(StepInput(tokens, positions, slices, logits_rows), sequences, sampled, prefills, prefill_tokens)

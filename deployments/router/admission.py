"""Whether a request may join the queue, and when a refused one should come back.

A queue that is bounded by number alone says little about waiting: ten long prompts are more than a hundred short ones.
Here the engine's near future is played through in steps, slots and pages: who runs ends, who waits starts in order, and
so the step in which a new request would start is known. It is accepted if that is now, or if it would wait no longer
than `max_wait_share` of what a usual request takes. By Little's law (1961) that holds requests of one size to
`max_wait_share` x `max_sequences` in the queue, so none takes longer than 1 + `max_wait_share` times what it does at
the limit.
Nobody knows how long an answer gets: the share of `max_tokens` that requests used of late stands for it.

A refused request is told to come back when a place is likely. Each refusal is promised a place of its own, one after
the other, lest all come back for the same one. Knows no threads and no model; the engine calls `check` under its lock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import OverloadedError
from deployments.router import sequence as sequences

SMOOTHING = 0.1
"""Weight of the newest step and the newest ended sequence in their means."""
LONGEST_S = 30
"""Nobody is sent away for longer: who knows what the load is then."""


@dataclass(frozen=True)
class Job:
    """What a sequence needs from now on, as far as one can tell.

    prompt_steps: whole steps its prompt takes; prompts share the budget, so those of all come one after the other.
    output_steps: one for each token. pages: on the mean over the rest of its life.
    """

    prompt_steps: float
    output_steps: float
    pages: int


def wait_steps(running: Iterable[Job], waiting: Iterable[Job], slots: int, pages: int) -> float:
    """The step in which the last of `waiting` starts, when they start in order and as early as slots and pages allow.

    >>> wait_steps([Job(0, 5, 1), Job(0, 9, 1)], [Job(0, 20, 1), Job(0, 1, 1)], slots=2, pages=9)
    9.0
    """
    ends: list[tuple[float, int]] = []
    computed = 0.0  # when the last prompt so far is
    for job in running:
        computed += job.prompt_steps
        ends.append((job.output_steps + (computed if job.prompt_steps else 0.0), job.pages))
    heapq.heapify(ends)
    free = pages - sum(held for _, held in ends)
    now = 0.0
    for job in waiting:
        while ends and (len(ends) >= slots or free < job.pages):
            now, released = heapq.heappop(ends)
            free += released
        if job.prompt_steps:
            computed = max(computed, now) + job.prompt_steps
        heapq.heappush(ends, ((computed if job.prompt_steps else now) + job.output_steps, job.pages))
        free -= job.pages
    return float(now)


class Admission:
    """Bounds of one engine. max_queued_requests, max_wait_share: as in `RouterSpec`; None for no bound by waiting.

    clock: seconds, monotonic. refused: requests turned away so far.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        pages: int,
        page_tokens: int,
        max_queued_requests: int,
        max_wait_share: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._pages = pages
        self._page_tokens = page_tokens
        self._max_queued_requests = max_queued_requests
        self._max_wait_share = max_wait_share
        self._clock = clock
        self._step_s: float | None = None
        self._used_share = 1.0
        self._promised_s = -math.inf
        self.refused = 0

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._step_s = seconds if self._step_s is None else self._step_s + SMOOTHING * (seconds - self._step_s)

    def ended(self, sequence: sequences.Sequence) -> None:
        """A sequence has all its tokens."""
        share = sequence.output_tokens / max(1, sequence.limit - sequence.request.prompt_tokens)
        self._used_share += SMOOTHING * (share - self._used_share)

    def check(
        self, choices: Sequence[sequences.Sequence], present: Sequence[sequences.Sequence], queued: int, at_once: int
    ) -> None:
        """Refuse a request that would wait too long. One that was accepted already (a resume, a further prompt of one
        HTTP request) is refused only where twice as many wait as may.

        choices: the request's. present: all sequences that have not ended. queued: requests among them that have not
        started. at_once: so many more could start now.

        Raises:
            OverloadedError: with when to come back.
        """
        request = choices[0].request
        accepted = request.accepted or len(request.tokens) > request.prompt_tokens
        fits = queued < self._max_queued_requests * (2 if accepted else 1) + at_once
        if fits and (accepted or self._max_wait_share is None):
            return
        wait, usual = self._wait(choices[0], present), self._usual(choices, present)
        too_long = wait - (self._max_wait_share or 1.0) * usual
        if fits and too_long <= 0:
            return
        self.refused += 1
        places = sum(bool(each.pages) for each in present)
        retry_after_s = self._retry_after_s(max(0.0, too_long), usual / max(1, places))
        raise OverloadedError(f"{queued} requests are waiting already; come back later.", retry_after_s)

    def _retry_after_s(self, too_long: float, between: float) -> int:
        """too_long: steps until the queue has room for one more. between: steps from one free place to the next."""
        step_s, now = self._step_s or 0.0, self._clock()
        due_s = max(now + step_s * too_long, self._promised_s) + step_s * between
        self._promised_s = min(due_s, now + LONGEST_S)
        return max(1, math.ceil(self._promised_s - now))

    def _wait(self, newest: sequences.Sequence, present: Sequence[sequences.Sequence]) -> float:
        """Steps until `newest` would start."""
        running = [self._job(each) for each in present if each.pages]
        waiting = sorted((each for each in present if not each.pages), key=lambda each: each.arrival)
        jobs = [self._job(each) for each in (*waiting, newest)]
        return wait_steps(running, jobs, self._max_sequences, self._pages)

    def _usual(self, choices: Sequence[sequences.Sequence], present: Sequence[sequences.Sequence]) -> float:
        """Steps from start to end, on the mean of those that have started; where none has, of all."""
        those = [each for each in present if each.pages] or [*choices, *present]
        total = sum(
            self._used_share * (each.limit - each.request.prompt_tokens)
            + self._prompt_tokens(each, each.request.prompt_tokens) / self._max_batch_tokens
            for each in those
        )
        return total / len(those)

    def _job(self, each: sequences.Sequence) -> Job:
        left = max(1.0, self._used_share * (each.limit - len(each.tokens)))
        # What is not computed yet is a prompt, also where it is computed again; of a decode row it is one token.
        prompt = self._prompt_tokens(each, each.remaining if each.remaining > 1 else 0)
        # An answer holds half of its tokens on the mean.
        pages = min(self._pages, -(-int(len(each.tokens) + left / 2) // self._page_tokens))
        return Job(prompt / self._max_batch_tokens, left, pages)

    def _prompt_tokens(self, each: sequences.Sequence, tokens: int) -> int:
        """Those that have to be computed: later choices of a request find their prompt in the pool."""
        return 0 if each.leader is not None and not each.pages else tokens

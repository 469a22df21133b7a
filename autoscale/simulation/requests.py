"""Requests on their way: waiting, prompt being computed, decoding, done. Pure; knows no groups and no policy.

First come, first served over all engines together: one fluid server as fast as all of them, where besides no prompt is
done sooner than one engine alone could do it. Exact within a tick (Lindley's recursion), so a request's times do not
depend on the tick. Work is conserved: `served_tokens` is what left the queue.

    arrival ──waits──> start ──prompt──> first token ──decodes──> done
    a decoding request gets one token per step: it is done when the engines' step clock has gone on by its tokens

Dimensions: N requests, D domains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoscale.traces import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Requests:
    """All requests of a trace and where they are. Times in seconds; NaN where it has not happened yet."""

    def __init__(self, trace: Trace, domain: Ints, domains: int) -> None:
        self._arrival = trace.arrival_s
        self._prompt = trace.prompt_tokens
        self._generated = trace.generated_tokens
        self.domain = domain
        self.domains = domains
        self.start_s = np.full(len(trace), np.nan)
        self.first_s = np.full(len(trace), np.nan)
        self._end_step = np.full(len(trace), np.inf)
        self._clock = [0.0]
        self._times = [0.0]
        self._ends = np.zeros((1 << 14, domains), dtype=np.int32)
        self._ended_upto = 0
        onehot = np.zeros((len(trace) + 1, domains))
        onehot[np.arange(1, len(trace) + 1), domain] = 1
        # [N + 1, D]: requests, and prompt tokens, of each domain before the i-th request.
        self._count_before = np.cumsum(onehot, axis=0, dtype=np.float64)
        onehot[1:] *= self._prompt[:, None]
        self._tokens_before = np.cumsum(onehot, axis=0)
        self._total_before = self._tokens_before.sum(axis=1)
        self.arrived = self.computed = self.done = 0
        self.decoding = np.zeros(domains, dtype=np.int64)
        self.served_tokens = 0.0
        self.rework_tokens = 0.0
        self.reworked_tokens = 0.0
        self._begun_tokens = 0.0
        self.busy_s = 0.0
        self._even = np.full(domains, 1 / domains)

    @property
    def waiting(self) -> int:
        """Requests without a first token."""
        return self.arrived - self.computed

    def arrive(self, until_s: float) -> None:
        """Take in what came before `until_s`."""
        self.arrived = int(np.searchsorted(self._arrival, until_s, side="left"))

    def undecoded_mix(self, slots: int) -> Floats:
        """[D]: requests of each domain without a first token, as many as there are slots for, as the router counts."""
        upto = min(self.arrived, max(self.computed, self.done + slots))
        mix: Floats = self._count_before[upto] - self._count_before[self.computed]
        return mix

    def queue_mix(self, tokens: float) -> Floats:
        """[D]: tokens of each domain among the next `tokens` of the queue, as shares; even where it is empty."""
        head = self.computed
        if head == self.arrived:
            return self._even
        upto = int(np.searchsorted(self._total_before, self._total_before[head] + tokens, side="right"))
        ahead = self._tokens_before[min(max(upto, head + 1), self.arrived)] - self._tokens_before[head]
        total = ahead.sum()
        mix: Floats = ahead / total if total > 0 else self._even
        return mix

    def redo(self, share: float) -> None:
        """An engine died: this share of the decoding requests must have their prompts computed anew, before others."""
        decoding = int(self.decoding.sum())
        if decoding and self.computed:
            recent = slice(max(0, self.computed - decoding), self.computed)
            self.rework_tokens += share * decoding * float(self._prompt[recent].mean())

    def compute(
        self, now: float, tick_s: float, token_s: Floats, engines: int, slots: int, clock_rate: tuple[float, float]
    ) -> Floats:
        """Compute prompts for a tick; returns [D]: prompt tokens computed of each domain, and sets `busy_s`.

        token_s[D]: seconds one engine needs for a prompt token. slots: requests that fit, decoding ones included.
        clock_rate: (decode steps per second of an engine while all compute prompts, while none does).
        """
        head, served = self.computed, np.zeros(self.domains)
        lim = min(self.arrived, max(head, self.done + slots))
        self.busy_s = 0.0
        busy_from = now
        if engines and self.rework_tokens:
            pace = engines / float(token_s.mean())
            redone = min(self.rework_tokens, pace * tick_s)
            self.rework_tokens -= redone
            self.reworked_tokens += redone
            busy_from += redone / pace
            self.busy_s += redone / pace
        if not engines or lim == head or busy_from >= now + tick_s:
            return served
        lim = self._reachable(head, lim, engines * (now + tick_s - busy_from) / float(token_s.min()))
        span = slice(head, lim)
        domain = self.domain[span]
        left = self._prompt[span].astype(np.float64)
        left[0] -= self._begun_tokens
        pace_s = token_s[domain] / engines
        work = left * pace_s
        before = np.cumsum(work) - work
        free = np.maximum(self._arrival[span], busy_from) - before
        start = np.maximum(np.maximum.accumulate(free) + before, self._arrival[span])
        finish = start + work
        end = now + tick_s
        begun = int(np.searchsorted(start, end, side="left"))
        finished = int(np.searchsorted(finish, end, side="right"))
        new = np.isnan(self.start_s[head : head + begun])
        self.start_s[head : head + begun][new] = start[:begun][new]
        took = np.minimum(finish[:begun], end) - start[:begun]
        self.busy_s += float(took.sum())
        tokens = took / pace_s[:begun]
        np.add.at(served, domain[:begun], tokens)
        self.served_tokens += float(tokens.sum())
        if finished:
            done = slice(head, head + finished)
            # One engine computes a prompt: all of them together are faster only over many prompts.
            own = self.start_s[done] + self._prompt[done] * token_s[domain[:finished]]
            self._begin_decoding(done, np.maximum(finish[:finished], own), now, tick_s, clock_rate)
        if finished:
            self._begun_tokens = 0.0
        if begun > finished:
            self._begun_tokens += float(tokens[finished])
        return served

    def _reachable(self, head: int, lim: int, tokens: float) -> int:
        """The queue as far as this tick can get: a long queue need not be looked at as a whole."""
        upto = self._total_before[head] + self._begun_tokens + tokens
        return min(lim, int(np.searchsorted(self._total_before, upto, side="right")) + 1)

    def _begin_decoding(
        self, done: slice, first_s: Floats, now: float, tick_s: float, clock_rate: tuple[float, float]
    ) -> None:
        self.first_s[done] = first_s
        busy = min(1.0, self.busy_s / tick_s)
        rate = busy * clock_rate[0] + (1 - busy) * clock_rate[1]
        end_step = self._clock[-1] + (first_s - now) * rate + self._generated[done] - 1
        self._end_step[done] = end_step
        bins = np.maximum(np.ceil(end_step).astype(np.int64), self._ended_upto + 1)
        while bins.max() >= len(self._ends):
            self._ends = np.concatenate([self._ends, np.zeros_like(self._ends)])
        np.add.at(self._ends, (bins, self.domain[done]), 1)
        self.decoding += np.bincount(self.domain[done], minlength=self.domains)
        self.computed += done.stop - done.start

    def decode(self, until_s: float, steps: float) -> None:
        """The engines' step clock goes on by `steps` until `until_s`."""
        self._clock.append(self._clock[-1] + steps)
        self._times.append(until_s)
        upto = min(int(self._clock[-1]), len(self._ends) - 1)
        if upto > self._ended_upto:
            ended = self._ends[self._ended_upto + 1 : upto + 1].sum(axis=0)
            self.decoding -= ended
            self.done += int(ended.sum())
            self._ended_upto = upto

    def finish_s(self) -> Floats:
        """[N]: when each request had its last token; infinite where it had not."""
        clock, times = np.array(self._clock), np.array(self._times)
        # The step clock stands still while nothing runs: the first moment at which it reads that much counts.
        moving = np.concatenate([[True], np.diff(clock) > 0])
        end = np.interp(self._end_step, clock[moving], times[moving], right=np.inf)
        return np.where(np.isfinite(self.first_s), np.maximum(end, self.first_s), np.inf)

"""The engine: one thread that schedules, runs, samples and emits until it is stopped, whatever a request does to it.

    submit ──> inbox ──┐            engine thread, one turn:
    cancel ──> dropped ┴─> intake ──> schedule ──> run ──> sample ──> emit

Each accepted request ends exactly once, by the chunk that finishes its last choice or by one exception, unless it is
cancelled. An error in a step fails the requests of that step and nothing else. Knows no HTTP, no asyncio and no
model: `backbone` runs the step and `emit` takes the chunks, both on the engine's thread.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.errors import DeadlineError, EngineError, ExpertScaleError, RouterStoppingError
from cluster.serve_logging import about, several
from deployments.generation import GenerationRequest, TokenChunk
from deployments.router.admission import Admission
from deployments.router.experts_used import ExpertRecord
from deployments.router.latency import Latency, Percentiles
from deployments.router.load import EngineStats
from deployments.router.page_pool import PagePool
from deployments.router.routing import RoutingRecord
from deployments.router.sampler import Sampled, sample
from deployments.router.scheduler import Plan, Scheduler
from deployments.router.sequence import Sequence, make_sequences
from deployments.router.step import BackboneLike
from deployments.router.tracing import StepSpans
from deployments.router.vitals import Vitals

logger = logging.getLogger(__name__)

Emit = Callable[[TokenChunk | Exception], None]


@dataclass(eq=False)
class _Live:
    """A request that has not ended. `deadline` is on the engine's clock."""

    request: GenerationRequest
    emit: Emit
    sequences: list[Sequence]
    deadline: float | None


class Engine:
    """Generates tokens for many requests at once. All methods but `turn` and `check_idle` from any thread.

    max_batch_tokens: tokens of one step. max_sequences: choices running at once. max_queued_requests: requests that
    may wait beyond those that can start at once. max_wait_share: as in `RouterSpec`, or None for no such bound.
    routing, experts, tracing: told of all steps. vitals: told when the thread works. wanted_until: told before each
    step when, by `clock`, nobody wants its results any more. clock: seconds, monotonic.
    """

    def __init__(
        self,
        backbone: BackboneLike,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_queued_requests: int,
        max_wait_share: float | None = None,
        routing: RoutingRecord | None = None,
        experts: ExpertRecord | None = None,
        tracing: StepSpans | None = None,
        vitals: Vitals | None = None,
        wanted_until: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backbone = backbone
        self._pool = PagePool(backbone.num_pages, backbone.page_tokens)
        self._scheduler = Scheduler(self._pool, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
        self._max_sequences = max_sequences
        self._admission = Admission(
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            pages=backbone.num_pages,
            page_tokens=backbone.page_tokens,
            max_queued_requests=max_queued_requests,
            max_wait_share=max_wait_share,
            clock=clock,
        )
        self._records = [record for record in (routing, experts, tracing) if record is not None]
        self._tracing = tracing
        self._vitals = vitals or Vitals()
        self._wanted_until = wanted_until
        self._clock = clock
        self._latency = Latency(clock)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Guarded by `_changed`:
        self._live: dict[str, _Live] = {}
        self._inbox: list[_Live] = []
        self._dropped: list[_Live] = []
        self._arrivals = 0
        self._closed = False
        self._stopped = False
        # Written by the engine's thread only:
        self._owner: dict[Sequence, _Live] = {}
        self._passed_over = False
        self._steps = 0
        self._tokens_generated = 0
        self._prefill_tokens = 0
        self._cached_tokens = 0
        self._last_step_s = self._step_s = 0.0

    def start(self) -> None:
        """Start the thread. Requests submitted earlier run now."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; for health checks."""
        return self._thread.is_alive()

    @property
    def responsive(self) -> bool:
        """Whether the thread runs and gets on: it computes, waits for experts within bounds, or has nothing to do."""
        return self.alive and not self._vitals.stuck

    def submit(self, request: GenerationRequest, emit: Emit) -> None:
        """Accept a request. `emit` is called on the engine's thread and must neither block nor raise.

        Raises:
            RequestError: it can never run here. OverloadedError: it would wait too long. RouterStoppingError: too late.
            EngineError: a request of this id is still alive.
        """
        with self._changed:
            if self._closed:
                raise RouterStoppingError("This router is stopping.")
            if request.request_id in self._live:
                raise EngineError(f"A request with the id {request.request_id!r} is still running.")
            now = self._clock()
            sequences = make_sequences(request, self._backbone, self._arrivals, now)
            queued = sum(not live.sequences[0].admitted for live in self._live.values())
            at_once = 0 if self._passed_over else self._max_sequences - len(self._scheduler.running)
            present = [each for live in self._live.values() for each in live.sequences if each.finish_reason is None]
            self._admission.check(sequences, present, queued, at_once)
            deadline = None if request.timeout_s is None else now + request.timeout_s
            live = _Live(request, emit, sequences, deadline)
            self._arrivals += len(sequences)
            self._live[request.request_id] = live
            self._inbox.append(live)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is alive: it emits no more, and its pages are free by the next step."""
        with self._changed:
            live = self._live.pop(request_id, None)
            if live is not None:
                self._dropped.append(live)
                self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others to end; whether they all did in time."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def stop(self, timeout_s: float = 60) -> None:
        """End the thread after its step and fail what is left with RouterStoppingError.

        A step that takes longer than `timeout_s` is left behind: its requests fail now, from the caller's thread.
        """
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        error = RouterStoppingError("This router is stopping.")
        if not self._thread.is_alive():
            self._fail_all(error)
            return
        with self._changed:
            left = list(self._live.values())
            self._live.clear()
        for live in left:
            self._emit(live, error)

    def stats(self) -> EngineStats:
        """A snapshot; the parts may be one step apart."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._in_inbox()),
            kv_used_tokens=self._pool.used * self._pool.page_tokens,
            kv_tokens=self._pool.num_pages * self._pool.page_tokens,
            steps=self._steps,
            tokens_generated=self._tokens_generated,
            prefill_tokens=self._prefill_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._scheduler.preemptions,
            last_step_s=self._last_step_s,
            step_s=self._step_s,
            refused=self._admission.refused,
        )

    def latency(self) -> Percentiles:
        """How quick tokens were of late: from `submit` to the first, and from one to the next of a sequence.

        Who still waits for the first one counts as soon as that is longer, lest a router that stands still look quick.
        """
        measured, now = self._latency.percentiles(), self._clock()
        ages = [now - each.awaited_since_s for each in self._present() if each.leader is None and not each.emitted]
        return replace(measured, ttft_p95_s=max([*ages, measured.ttft_p95_s or 0.0])) if ages else measured

    def undecoded(self) -> list[Sequence]:
        """Those that will decode soon and do not yet: not to be changed.

        Prompts that are being computed, and as many of those that wait as there is room for beside what runs.
        """
        running = list(self._scheduler.running)
        waiting = [*self._scheduler.waiting, *self._in_inbox()]
        begun = [sequence for sequence in running if sequence.remaining > 1]
        return [*begun, *waiting[: max(0, self._max_sequences - len(running))]]

    def _present(self) -> list[Sequence]:
        """All sequences that have not ended."""
        return [*self._scheduler.running, *self._scheduler.waiting, *self._in_inbox()]

    def _in_inbox(self) -> list[Sequence]:
        return [sequence for live in list(self._inbox) for sequence in live.sequences]

    def check_idle(self) -> None:
        """Raise RuntimeError if anything is left over although no request is alive. Not while the engine works."""
        if self._live or self._owner or self._scheduler.running or self._scheduler.waiting:
            raise RuntimeError("the engine is not idle")
        self._pool.check_idle()

    def turn(self) -> bool:
        """Take in what has arrived and run one step, if there is one; the thread's loop, once. False: nothing to do."""
        self._vitals.work()
        self._intake()
        working = bool(self._owner)
        if working:
            started = time.perf_counter()
            self._step()
            self._last_step_s = time.perf_counter() - started
            self._step_s += self._last_step_s
            self._admission.step(self._last_step_s)
        self._passed_over = bool(self._scheduler.waiting)
        return working

    def _loop(self) -> None:
        while self._await_work():
            try:
                self.turn()
            except Exception as error:
                # A defect of the engine itself. Everybody learns of it, and later requests get their chance.
                owners = dict.fromkeys(self._owner.values())
                logger.exception("the engine failed outside a step: %s", _ids(owners), extra=_about(owners))
                self._fail_all(EngineError(f"The engine failed: {type(error).__name__}."))

    def _await_work(self) -> bool:
        self._vitals.rest()
        with self._changed:
            self._changed.wait_for(lambda: self._owner or self._inbox or self._dropped or self._stopped)
            return not self._stopped

    def _intake(self) -> None:
        """Move arrivals to the scheduler, and drop what was cancelled or is late."""
        with self._changed:
            arrived, self._inbox = self._inbox, []
            dropped, self._dropped = self._dropped, []
            live = list(self._live.values())
        for each in arrived:
            for sequence in each.sequences:
                self._owner[sequence] = each
                self._scheduler.add(sequence)
        for each in dropped:
            self._remove(each)
        now = self._clock()
        for each in live:
            if each.deadline is not None and each.deadline <= now:
                self._fail(each, DeadlineError(f"The request did not finish within {each.request.timeout_s:g} s."))

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        if not plan.sequences:
            raise RuntimeError("sequences wait, but none can run")
        try:
            outcomes = self._run(plan)
        except Exception as error:
            if self._tracing is not None:
                self._tracing.failed(error)
            owners = dict.fromkeys(self._owner[sequence] for sequence in plan.sequences)
            ids = _ids(owners)
            if isinstance(error, ExpertScaleError):
                logger.warning("a step failed, and with it %s: %s", ids, error, extra=_about(owners))
            else:
                what = "a step of %d tokens failed, and with it %s"
                logger.exception(what, len(plan.step.tokens), ids, extra=_about(owners))
                error = EngineError(f"A step failed: {type(error).__name__}.")
            for live in owners:
                self._fail(live, error)
            return
        now = self._clock()
        emitted = []
        for sequence, outcome in zip(plan.sampled, outcomes, strict=True):
            owner = self._owner.get(sequence)  # None if another choice of the request has just failed
            if owner is not None and self._emit_outcome(owner, sequence, outcome):
                emitted.append(sequence)
        self._latency.step(emitted, now)

    def _run(self, plan: Plan) -> list[Sampled | EngineError]:
        """Whatever this raises belongs to the requests of the step."""
        deadlines = [self._owner[sequence].deadline for sequence in plan.sequences]
        self._wanted_until(max(float("inf") if each is None else each for each in deadlines))
        for record in self._records:
            record.begin(plan)
        outcomes = sample(self._backbone.forward(plan.step), plan.sampled)
        self._scheduler.advance(plan)
        for record in self._records:
            record.end(plan)
        self._steps += 1
        self._prefill_tokens += plan.prefill_tokens
        return outcomes

    def _emit_outcome(self, live: _Live, sequence: Sequence, outcome: Sampled | EngineError) -> bool:
        """Whether a token was emitted."""
        if isinstance(outcome, EngineError):
            # What its pages hold may be as broken as its logits: nobody shall reuse them.
            self._fail(live, outcome, forget=True)
            return False
        chunk = sequence.append(outcome.token, self._backbone.eos_token_ids, outcome.logprob)
        self._tokens_generated += 1
        self._cached_tokens += chunk.cached_tokens
        if sequence.finish_reason is not None:
            self._admission.ended(sequence)
            self._release([sequence])
        finished = all(other.finish_reason for other in live.sequences)
        emitted = self._end(live) if finished else self._alive(live)
        if emitted:
            self._emit(live, chunk)
        return emitted

    def _fail(self, live: _Live, error: Exception, *, forget: bool = False) -> None:
        if self._remove(live, forget=forget):
            # One exception object raised by several consumers would collect all their tracebacks.
            self._emit(live, copy.copy(error))

    def _emit(self, live: _Live, item: TokenChunk | Exception) -> None:
        """Hand over an item. A consumer that raises loses its request, not the engine."""
        try:
            live.emit(item)
        except Exception:
            what = "the consumer of request %s failed; it is dropped"
            logger.exception(what, live.request.request_id, extra=_about([live]))
            self._remove(live)

    def _remove(self, live: _Live, *, forget: bool = False) -> bool:
        """Free all a request holds and end it; False if it had ended already."""
        self._release(live.sequences, forget=forget)
        return self._end(live)

    def _release(self, sequences: Iterable[Sequence], *, forget: bool = False) -> None:
        for sequence in sequences:
            if self._owner.pop(sequence, None) is not None:
                self._scheduler.remove(sequence, forget=forget)

    def _alive(self, live: _Live) -> bool:
        return self._live.get(live.request.request_id) is live

    def _end(self, live: _Live) -> bool:
        """Strike the request from the list; False if it was cancelled, and nothing may be emitted any more."""
        with self._changed:
            alive = self._alive(live)
            if alive:
                del self._live[live.request.request_id]
                self._changed.notify_all()
            return alive

    def _fail_all(self, error: Exception) -> None:
        self._intake()
        owners = dict.fromkeys(self._owner.values())
        for live in owners:  # everybody is told, even if the pool turns out to be what is broken
            if self._end(live):
                self._emit(live, copy.copy(error))
        for live in owners:
            self._release(live.sequences)


def _ids(owners: Iterable[_Live]) -> str:
    """As a message names them."""
    requests = [owner.request for owner in owners]
    return ", ".join(each.request_id for each in requests) + several(*(each.x_request_id for each in requests))


def _about(owners: Iterable[_Live]) -> dict[str, object]:
    """The HTTP requests of `owners`, for a line of the log: this thread is no task of theirs."""
    return about(*(owner.request.x_request_id for owner in owners))

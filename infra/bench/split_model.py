"""The engine alone: routers and expert replicas in processes of their own, as deployed, but without Ray and HTTP.

    python -m infra.bench.split_model --config deployments/configs/demo.yaml --clients 1,8,32 --tokens 128

prints tokens per second, the time of a decode step, and CPU time per token of routers and experts. Knows transports
that need no Ray only (stream, local). Thread variables are inherited, see threads.env.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import yaml

from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import HOME_POOL, AppConfig, parse_args
from cluster.fabric.server import ServerStats
from cluster.membership import Epoch, Replica, View
from cluster.telemetry import tracer
from deployments.generation import GenerationRequest, SamplingParams, TokenChunk
from infra.bench.processes import Remote, together

NODE = "this-machine"
RUN_S = 180.0
FIRST_ORDINARY_TOKEN = 3
PRELOADED = ("deployments.experts.replica", "deployments.router.runtime", "transformers.modeling_utils")
"""Start no thread when imported, so that forking is safe."""

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Decoded:
    """What a batch of requests took, from the first submission to the last token.

    tokens: generated. steps_s: times between two tokens of a sequence while every sequence of its router was decoding.
    router_cpu_s, experts_cpu_s: CPU seconds of all processes of a kind, all their threads.
    rows, batches: of all expert replicas; 0 where the routers hold the experts.
    """

    tokens: int
    wall_s: float
    steps_s: tuple[float, ...]
    router_cpu_s: float
    experts_cpu_s: float
    rows: int
    batches: int

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all sequences over the wall time, prefill included."""
        return self.tokens / self.wall_s

    @property
    def step_s_median(self) -> float:
        """The median decode step; there is none (StatisticsError) where fewer than two tokens were asked for."""
        return statistics.median(self.steps_s)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes."""
        return self.router_cpu_s + self.experts_cpu_s

    @property
    def rows_per_batch(self) -> float:
        """Mean rows an expert replica computed at once."""
        return self.rows / max(1, self.batches)


class SplitModel:
    """`routers` router processes that share one process per expert replica; a context manager.

    local: the routers hold the experts themselves, the baseline without a fabric.
    forked: fork the processes from one that has imported everything, instead of starting each from nothing as Ray does.
        That saves seconds, but shared pages make a step several percent faster: compare forked with forked only.
    environment: variables of the processes; with an endpoint for traces they send spans of traced requests.

    Raises:
        RuntimeError: a process failed; the message is its traceback. TimeoutError: it did not answer.
    """

    def __init__(
        self,
        args: AppConfig,
        routers: int = 1,
        local: bool = False,
        *,
        forked: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if local:
            args = args.model_copy(update={"experts": args.experts.model_copy(update={"transport": "local"})})
        self._args = args
        self._seeds = itertools.count()
        self._requests = itertools.count(1)
        self._environment = dict(environment or {})
        self._vocab_size = 0
        self._routers: list[Remote] = []
        self._experts: list[Remote] = []
        self._number_of_routers = routers
        self._forked = forked

    def __enter__(self) -> SplitModel:
        blueprint = make_blueprint(self._args)
        key = secrets.token_bytes(32)
        experts = self._args.experts
        groups = () if experts.transport == "local" else enumerate(experts.group_names)
        pools = (HOME_POOL, *experts.pools)
        replicas = [index for index, group in groups for pool in pools for _ in range(experts.replicas_of(group, pool))]
        preload = PRELOADED if self._forked else ()
        try:
            for number, index in enumerate(replicas):
                make = partial(_Expert, self._args, blueprint, index, f"replica-{number}", key, self._environment)
                self._experts.append(Remote(make, preload))
            for _ in range(self._number_of_routers):
                make_router = partial(_Router, self._args, blueprint, key, self._environment)
                self._routers.append(Remote(make_router, preload))
            for process in (*self._experts, *self._routers):
                process.answer()
            view = View(Epoch("bench", 1), tuple(together(self._experts, "record")))
            self._vocab_size = together(self._routers, "start", view)[0]
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def decode(
        self,
        clients: int,
        prompt_tokens: int,
        new_tokens: int,
        *,
        routers: int | None = None,
        trace_every: int | None = None,
    ) -> Decoded:
        """`run` on prompts that no earlier call has had."""
        prompts = self.prompts(clients, prompt_tokens)
        return self.run(prompts, new_tokens, routers=routers, trace_every=trace_every)

    def prompts(self, clients: int, prompt_tokens: int) -> list[Prompt]:
        """Random tokens, others at every call, the same in every run of the benchmark."""
        generator = torch.Generator().manual_seed(next(self._seeds))
        shape = (clients, prompt_tokens)
        drawn = torch.randint(FIRST_ORDINARY_TOKEN, self._vocab_size, shape, generator=generator)
        return [tuple(prompt) for prompt in drawn.tolist()]

    def run(
        self,
        prompts: Sequence[Prompt],
        new_tokens: int,
        *,
        routers: int | None = None,
        trace_every: int | None = None,
    ) -> Decoded:
        """Greedy decoding of the prompts, all submitted at once and spread over the first `routers` routers in turn.

        With one new token this is a prefill. Routers reuse what they still hold of earlier prompts.
        trace_every: each how many-th request is traced, over all runs; None for none.
        """
        traces = [_trace() if trace_every and next(self._requests) % trace_every == 0 else "" for _ in prompts]
        before = together(self._experts, "load")
        working = self._routers[: min(len(prompts), routers or len(self._routers))]
        for number, router in enumerate(working):
            router.ask("run", prompts[number :: len(working)], traces[number :: len(working)], new_tokens)
        runs: list[_Run] = [router.answer(RUN_S) for router in working]
        after = together(self._experts, "load")
        return Decoded(
            tokens=sum(len(times) for run in runs for times in run.emitted_at),
            wall_s=max(run.ended_at for run in runs) - min(run.started_at for run in runs),
            steps_s=tuple(step_s for run in runs for step_s in run.steps_s()),
            router_cpu_s=sum(run.cpu_s for run in runs),
            experts_cpu_s=_rise(before, after, lambda load: load.cpu_s),
            rows=int(_rise(before, after, lambda load: load.stats.rows)),
            batches=int(_rise(before, after, lambda load: load.stats.batches)),
        )

    def flush(self) -> float:
        """Send the spans that wait to be sent; returns the CPU seconds of that, in all processes."""
        used_s: list[float] = together([*self._routers, *self._experts], "flush")
        return sum(used_s)

    def _close(self) -> None:
        # Routers first: an expert that goes before them is a failure to them, which they would log.
        for processes in (self._routers, self._experts):
            for process in processes:
                process.hang_up()
            for process in processes:
                process.join()
            processes.clear()


@dataclass(frozen=True)
class _Load:
    """What an expert process has done so far."""

    stats: ServerStats
    cpu_s: float


@dataclass(frozen=True)
class _Run:
    """One router's part of a run. emitted_at: when each token of each request came. All on the monotonic clock."""

    started_at: float
    ended_at: float
    cpu_s: float
    emitted_at: list[list[float]]

    def steps_s(self) -> list[float]:
        """Gaps between tokens from when the last request has its first one until the first request ends."""
        begin = max(times[0] for times in self.emitted_at)
        end = min(times[-1] for times in self.emitted_at)
        pairs = [pair for times in self.emitted_at for pair in itertools.pairwise(times)]
        return [later - earlier for earlier, later in pairs if begin <= earlier and later <= end]


class _Traced:
    """What has a tracer where the environment names an endpoint."""

    def __init__(self, service: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # OpenTelemetry reads the process's own
        self.tracer = tracer(service, {}, os.environ)

    def flush(self) -> float:
        before_s = time.process_time()
        if self.tracer is not None:
            self.tracer.span_processor.force_flush()  # type: ignore[attr-defined]  # of the SDK's
        return time.process_time() - before_s


class _Expert(_Traced):
    """One expert replica in its process."""

    def __init__(
        self,
        args: AppConfig,
        blueprint: Blueprint,
        index: int,
        replica_id: str,
        key: bytes,
        environment: Mapping[str, str],
    ) -> None:
        from deployments.experts.replica import ExpertReplica

        super().__init__("expertscale-experts", environment)
        emulate = args.experts.emulate
        self._replica = ExpertReplica(
            blueprint,
            args.experts,
            index,
            replica_id=replica_id,
            key=key,
            node=NODE,
            emulate_rows_per_s=emulate.rows_per_s if emulate else None,
            batch_invariant=args.router.batch_invariant,
            tracer=self.tracer,
        )

    def record(self) -> Replica:
        return self._replica.record()

    def load(self) -> _Load:
        return _Load(self._replica.server.stats(), time.process_time())

    def close(self) -> None:
        self._replica.close()


class _Router(_Traced):
    """One router in its process."""

    def __init__(self, args: AppConfig, blueprint: Blueprint, key: bytes, environment: Mapping[str, str]) -> None:
        from deployments.router.runtime import RouterRuntime

        super().__init__("expertscale-router", environment)
        self._runtime = RouterRuntime(blueprint, args.experts, args.router, key=key, node=NODE, tracer=self.tracer)
        self._ids = itertools.count()
        self._local = args.experts.transport == "local"

    def start(self, view: View) -> int:
        """Start the engine; returns the size of the vocabulary."""
        if not self._local:  # a router that holds all experts itself has a view of its own
            self._runtime.dispatcher.update(view)
        self._runtime.start()
        return self._runtime.backbone.vocab_size

    def run(self, prompts: Sequence[Prompt], traces: Sequence[str], new_tokens: int) -> _Run:
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
        requests = [
            GenerationRequest(f"request-{next(self._ids)}", prompt, sampling, prompt_tokens=len(prompt), trace=trace)
            for prompt, trace in zip(prompts, traces, strict=True)
        ]
        emitted_at: list[list[float]] = [[] for _ in requests]
        failures: list[Exception] = []
        left = set(range(len(requests)))
        ended = threading.Event()

        def emit(number: int, item: TokenChunk | Exception) -> None:
            if isinstance(item, Exception):
                failures.append(item)
                ended.set()
                return
            emitted_at[number].extend([time.monotonic()] * len(item.tokens))
            if item.finish_reason is not None:
                left.remove(number)
                if not left:
                    ended.set()

        started_at, cpu_s = time.monotonic(), time.process_time()
        for number, request in enumerate(requests):
            self._runtime.engine.submit(request, partial(emit, number))
        if not ended.wait(RUN_S):
            raise TimeoutError(f"{len(left)} of {len(requests)} requests did not end within {RUN_S:g} s")
        if failures:
            raise failures[0]
        return _Run(started_at, time.monotonic(), time.process_time() - cpu_s, emitted_at)

    def close(self) -> None:
        self._runtime.stop()


def _trace() -> str:
    """The `traceparent` of a request that is traced."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def _rise(before: Sequence[_Load], after: Sequence[_Load], total: Callable[[_Load], float]) -> float:
    return sum(total(late) - total(early) for early, late in zip(before, after, strict=True))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="infra.bench.split_model", description="The engine alone: no HTTP, no Ray.")
    parser.add_argument("--config", type=Path, required=True, help="a config file of `make serve`")
    parser.add_argument("--clients", default="1,8,32", help="requests at once, one run for each number")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="repeat all runs this often")
    parser.add_argument("--local", action="store_true", help="experts in the router's process")
    options = parser.parse_args(arguments)
    document = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    args = parse_args(document["applications"][0]["args"])
    counts = [int(text) for text in options.clients.split(",")]
    print("clients  tokens/s  step ms  CPU ms/token: all  router  experts  rows/batch")
    with SplitModel(args, options.routers, options.local) as model:
        model.decode(max(counts), options.prompt_tokens, 8)  # warm up
        for clients in counts * options.rounds:
            done = model.decode(clients, options.prompt_tokens, options.tokens)
            cpu_ms = [1e3 * cpu_s / done.tokens for cpu_s in (done.cpu_s, done.router_cpu_s, done.experts_cpu_s)]
            print(
                f"{clients:7}  {done.tokens_per_s:8.1f}  {1e3 * done.step_s_median:7.2f}  {cpu_ms[0]:17.2f}  "
                f"{cpu_ms[1]:6.2f}  {cpu_ms[2]:7.2f}  {done.rows_per_batch:10.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

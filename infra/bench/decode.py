"""Decoding through HTTP against the engine alone, the whole model's `generate`, and `transformers serve`.

Sides take turns while the others wait idle: the whole model's process and those of the engine alone block on pipes and
sockets, the server's Ray goes on polling itself (its idle CPU share is a figure, and so is what that costs `generate`,
which has also run before the server started). All sides get random prompts of PROMPT_TOKENS ids, new ones in every run
so that no prefix is found in a cache, and give exactly NEW_TOKENS tokens each, greedily. Tokens per second are over the
whole run, prompts included. `generate` runs with one torch thread and with two, and the faster one counts. The HTTP
clients share the machine with the server; what they use is a figure too. A token whose bytes are no whole character yet
is sent with a later one, which the coalescing factor includes.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from infra.bench.context import Context
from infra.bench.figures import Figure, compared
from infra.bench.http_load import Endpoint, Load
from infra.bench.measure import Samples, alternate, cpu_s
from infra.bench.memory import kind_of
from infra.bench.models import BenchModel
from infra.bench.reference import THREADS, WholeModel, random_prompts
from infra.bench.split_model import SplitModel

SIDE = "serving"
PROMPT_TOKENS, NEW_TOKENS = 24, 128
WARM_UP_TOKENS, TRIAL_TOKENS = 8, 32
CLIENTS, PEER_CLIENTS = (1, 8, 32), (1, 16)
ENGINE_TARGET = {8: 1.0, 32: 1.0}
HTTP_TARGET = {1: 0.9, 32: 0.9}
STRETCH_TARGET = {32: 1.25}
CPU_TARGET = 1.25
PEER_TARGET = {16: 8.0}
GIVEN_UP = 1.5
"""How much slower a number of threads is that does not take turns any more. An idle server takes a smaller share."""
IDLE_S = 3.0
SHOWN_MS = 0.05
"""CPU per token of a kind of process that is worth a line."""

_seeds = itertools.count(1000)


@dataclass(frozen=True)
class Sides:
    """What takes turns on one model.

    server: None where there is none. alone: of `without_server`, where there is one.
    """

    model: BenchModel
    whole: WholeModel
    engine: SplitModel
    server: Endpoint | None = None
    alone: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    def threads(self, clients: int) -> list[int]:
        """The numbers of threads worth trying: what was far slower without a server will not win beside one."""
        speed = self.alone.get(clients, dict.fromkeys(THREADS, 1.0))
        return [threads for threads in THREADS if GIVEN_UP * speed[threads] >= max(speed.values())]


@dataclass
class _Taken:
    """What runs tell beside tokens per second: CPU milliseconds per token, and the loads themselves.

    by_kind: of the server's processes, by what they do; one entry a run.
    """

    cpu_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_kind: list[Mapping[str, float]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def cpu(self, side: str) -> Samples:
        """The samples of one side."""
        return Samples(tuple(self.cpu_ms[side]))


def decode(context: Context, sides: Sides) -> Iterable[Figure]:
    """Figures at each number of clients; without a server, of the engine alone. A smoke run takes few tokens."""
    name, server = sides.model.name, sides.server
    idle_share = 0.0 if server is None else _idle_share(server)
    if server is not None:
        yield Figure(SIDE, name, "CPU of the idle server, share of a core", idle_share, "")
    new_tokens = WARM_UP_TOKENS // 2 if context.smoke else NEW_TOKENS
    for clients in CLIENTS[:2] if context.smoke else CLIENTS:
        context.progress(f"{name}: decode, {clients} clients")
        _run_all(sides, clients, WARM_UP_TOKENS, _Taken())
        taken = _Taken()
        # One client costs least and varies most.
        rounds = context.rounds(3 if clients == 1 else 2)
        speed = _run_all(sides, clients, new_tokens, taken, rounds)
        case = f"{name}, {clients} clients"
        yield from _speed_figures(case, clients, speed)
        if server is not None:
            yield _idling_figure(case, speed, max(sides.alone[clients].values()))
            yield from _http_figures(case, clients, taken, idle_share)


def without_server(context: Context, model: BenchModel, whole: WholeModel) -> dict[int, dict[int, float]]:
    """Clients -> number of threads -> tokens per second of `generate`, while no server runs."""
    speed: dict[int, dict[int, float]] = {}
    for clients in CLIENTS:
        context.progress(f"{model.name}: generate without a server, batch of {clients}")
        speed[clients] = {}
        for threads in THREADS:
            whole.generate_s(_prompts(model, clients), WARM_UP_TOKENS, threads)
            took_s = whole.generate_s(_prompts(model, clients), NEW_TOKENS, threads)
            speed[clients][threads] = clients * NEW_TOKENS / took_s
    return speed


def _run_all(sides: Sides, clients: int, new_tokens: int, taken: _Taken, rounds: int = 1) -> dict[str, Samples]:
    """Tokens per second of the sides in turn; `taken` gets what else they tell."""
    model, server = sides.model, sides.server

    def generate(threads: int) -> float:
        return clients * new_tokens / sides.whole.generate_s(_prompts(model, clients), new_tokens, threads)

    def alone() -> float:
        done = sides.engine.decode(clients, PROMPT_TOKENS, new_tokens)
        taken.cpu_ms["engine"].append(1e3 * done.cpu_s / done.tokens)
        return done.tokens_per_s

    def http() -> float:
        assert server is not None
        before, own_s = _cpu_by_pid(server), time.process_time()
        load = server.complete(_prompts(model, clients), new_tokens)
        taken.cpu_ms["client"].append(1e3 * (time.process_time() - own_s) / load.tokens)
        used_s = _cpu_rise_s(before, _cpu_by_pid(server))
        taken.cpu_ms["http"].append(1e3 * sum(used_s.values()) / load.tokens)
        taken.by_kind.append({kind: 1e3 * kind_s / load.tokens for kind, kind_s in used_s.items()})
        taken.loads.append(load)
        return load.tokens_per_s

    runs: dict[str, Callable[[], float]] = {
        f"generate, {threads} threads": partial(generate, threads) for threads in sides.threads(clients)
    }
    runs["engine"] = alone
    if server is not None:
        runs["http"] = http
    return alternate(runs, rounds=rounds, warm_up=0)


def _speed_figures(case: str, clients: int, speed: dict[str, Samples]) -> Iterable[Figure]:
    against, whole = _best_generate(speed)
    for side, what, targets in (
        ("engine", "decode, engine alone", ENGINE_TARGET),
        ("http", "decode, HTTP", HTTP_TARGET),
        ("http", "decode, HTTP (stretch)", STRETCH_TARGET),
    ):
        if side in speed and (clients in targets or targets is not STRETCH_TARGET):
            target = targets.get(clients)
            yield compared(SIDE, case, what, speed[side], against, whole, unit="tokens/s", target=target, at_most=False)


def _best_generate(speed: dict[str, Samples]) -> tuple[str, Samples]:
    """Name and samples of the faster number of threads."""
    generates = ((side, samples) for side, samples in speed.items() if side.startswith("generate"))
    return max(generates, key=lambda item: item[1].median)


def _idling_figure(case: str, speed: dict[str, Samples], alone: float) -> Figure:
    """What the reference loses to a server that only idles beside it, which flatters the other sides."""
    _, whole = _best_generate(speed)
    what = "generate, server idle"
    return Figure(SIDE, case, what, whole.median, "tokens/s", "no server", alone, spread=whole.spread)


def _http_figures(case: str, clients: int, taken: _Taken, idle_share: float) -> Iterable[Figure]:
    http, engine, loads = taken.cpu("http"), taken.cpu("engine"), taken.loads
    what = "CPU per token, all server processes"
    yield compared(SIDE, case, what, http, "engine alone", engine, unit="ms", target=CPU_TARGET)
    above = [cpu_ms - 1e3 * idle_share / load.tokens_per_s for cpu_ms, load in zip(http.values, loads, strict=True)]
    what = "CPU per token, without what idling takes"
    yield compared(SIDE, case, what, Samples(tuple(above)), "engine alone", engine, unit="ms")
    if clients == max(CLIENTS):
        yield from _kind_figures(case, taken)
    factor = Samples(tuple(load.tokens_per_event for load in loads))
    yield Figure(SIDE, case, "coalescing: tokens per event", factor.median, "", spread=factor.spread)
    events = Samples(tuple(load.events_per_read for load in loads))
    yield Figure(SIDE, case, "events per read of the client", events.median, "", spread=events.spread)
    gaps = [Samples(tuple(1e3 * load.gap_s(share) for load in loads)) for share in (0.95, 0.5)]
    yield compared(SIDE, case, "gap between events, p95", gaps[0], "p50", gaps[1], unit="ms")


def _kind_figures(case: str, taken: _Taken) -> Iterable[Figure]:
    """Where the CPU time of the server and its clients goes."""
    shares = {
        f"of {kind}": Samples(tuple(run.get(kind, 0.0) for run in taken.by_kind))
        for kind in sorted(set().union(*taken.by_kind))
    }
    for kind, share in {**shares, "of the clients, beside": taken.cpu("client")}.items():
        if share.median >= SHOWN_MS:
            yield Figure(SIDE, case, f"CPU per token {kind}", share.median, "ms", spread=share.spread)


def best_threads(model: BenchModel, whole: WholeModel) -> int:
    """The number of threads with which one client is answered fastest, by a short trial."""
    prompts = _prompts(model, 1)
    trials = [(whole.generate_s(prompts, TRIAL_TOKENS, threads), threads) for threads in THREADS * 3]
    return min(trials)[1]


def against_peer(context: Context, model: BenchModel, server: Endpoint, peer: Endpoint, about: str) -> Iterable[Figure]:
    """Our HTTP and `transformers serve`, the same texts; `about` says how the peer runs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)

    def speed(endpoint: Endpoint, clients: int, new_tokens: int) -> float:
        # The peer takes text only.
        texts = [tokenizer.decode(prompt) for prompt in _prompts(model, clients)]
        return endpoint.complete(texts, new_tokens).tokens_per_s

    for endpoint in (server, peer):
        speed(endpoint, 1, WARM_UP_TOKENS)
    for clients in PEER_CLIENTS:
        context.progress(f"{model.name}: transformers serve, {clients} clients")
        sides = {"http": lambda n=clients: speed(server, n, NEW_TOKENS)}
        sides["peer"] = lambda n=clients: speed(peer, n, NEW_TOKENS)
        # The peer answers one request after the other: a round of many clients takes it a quarter of a minute.
        found = alternate(sides, rounds=context.rounds(2 if clients == 1 else 1), warm_up=0)
        case, what = f"{model.name}, {clients} clients", "decode, HTTP, text prompts"
        target = PEER_TARGET.get(clients)
        yield compared(
            SIDE, case, what, found["http"], about, found["peer"], unit="tokens/s", target=target, at_most=False
        )


def _prompts(model: BenchModel, clients: int) -> list[list[int]]:
    return random_prompts(clients, PROMPT_TOKENS, model.vocab_size, next(_seeds))


def _idle_share(server: Endpoint) -> float:
    """CPU seconds a second of all processes while nobody asks for anything."""
    before, started_at = _cpu_by_pid(server), time.monotonic()
    time.sleep(IDLE_S)
    return sum(_cpu_rise_s(before, _cpu_by_pid(server)).values()) / (time.monotonic() - started_at)


def _cpu_by_pid(server: Endpoint) -> dict[int, float]:
    return {pid: cpu_s([pid]) for pid in server.pids()}


def _cpu_rise_s(before: dict[int, float], after: dict[int, float]) -> dict[str, float]:
    """CPU seconds between two looks, by kind of process. One that ended is left out, one that began counts whole."""
    rises: dict[str, float] = defaultdict(float)
    for pid, used_s in after.items():
        rises[kind_of(pid)] += max(0.0, used_s - before.get(pid, 0.0))
    return rises

"""How soon an added expert replica gets its first rows, against a bare replica that only imports torch.

One cluster, the same load: experts-0 of the running demo goes from one replica to two and back, and so does a bare
deployment, in turn. A router connects to a replica with the first rows it has for it, so these are seen from outside as
the replica's first connection; that rows were computed is confirmed by the replica's own report, which comes up to a
second later. The bare replica is there when Serve calls it running.
Starts no cluster.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil

from infra.bench.figures import Figure, compared
from infra.bench.measure import alternate
from infra.bench.models import BenchModel
from infra.bench.serve_rest import ANSWER_S, ServeRest, is_connected

GROUP = "experts-0"
BARE = {"name": "bare", "route_prefix": "/bare", "import_path": "infra.bench.weightless_app:bare"}
ROUNDS = 3
POLL_S, REPLICA_S = 0.1, 60.0

CLIENTS, PROMPT_TOKENS, NEW_TOKENS = 4, 256, 128
FIRST_ORDINARY_TOKEN = 3


class Client:
    """Completions of random prompts at `url`."""

    def __init__(self, url: str, model: BenchModel) -> None:
        self.url = url
        self._name = model.args.model.served_name
        self._vocab_size = model.vocab_size
        self._seeds = itertools.count()

    def first_token_s(self) -> float:
        """Seconds to the answer of one token to a prompt of one."""
        started = time.monotonic()
        self.complete(1, 1)
        return time.monotonic() - started

    def complete(self, prompt_tokens: int, new_tokens: int) -> None:
        """One streamed completion, read to its end, of a prompt that no earlier one has had."""
        draw = random.Random(next(self._seeds))
        prompt = [draw.randrange(FIRST_ORDINARY_TOKEN, self._vocab_size) for _ in range(prompt_tokens)]
        body = {"model": self._name, "prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True, "stream": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            response.read()

    @contextmanager
    def steady_load(self) -> Iterator[None]:
        """`CLIENTS` that ask again and again until the block ends.

        Prompts are long enough that computing their rows takes longer than sending some of them elsewhere.
        """
        stop = threading.Event()
        failures: list[Exception] = []

        def ask() -> None:
            try:
                while not stop.is_set():
                    self.complete(PROMPT_TOKENS, NEW_TOKENS)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]


def added_replica(
    client: Client, application: Mapping[str, Any], served_by: psutil.Process, *, target: float
) -> Figure:
    """The figure for the running `application`, which `client` talks to and whose `serve run` is `served_by`.

    It has its own numbers of replicas afterwards.
    """
    cluster = _Cluster(client.url, application, served_by)
    cluster.deploy()
    cluster.await_one_each()
    with client.steady_load():
        sides = {"ours": cluster.add_expert_replica, "bare": cluster.add_bare_replica}
        taken = alternate(sides, rounds=ROUNDS, warm_up=0)
    what, against = "an added expert replica to its first rows", "one that imports torch, until running"
    case = f"demo, {CLIENTS} clients"
    return compared("startup", case, what, taken["ours"], against, taken["bare"], unit="s", target=target)


class _Cluster:
    """The demo and the bare deployment in one Serve.

    Replicas are added by a config that differs in their numbers only: Serve applies that without restarting anything.
    """

    def __init__(self, url: str, application: Mapping[str, Any], served_by: psutil.Process) -> None:
        self._url = url
        self._application = application
        self._serve = ServeRest(served_by)

    def deploy(self, *, experts: int = 1, bare: int = 1) -> None:
        """Ask for these numbers of replicas."""
        ours = {**self._application, "deployments": [{"name": GROUP, "num_replicas": experts}]}
        self._serve.deploy([ours, {**BARE, "deployments": [{"name": "Bare", "num_replicas": bare}]}])

    def add_expert_replica(self) -> float:
        """Seconds until a router sends rows to the new replica."""
        known_pids, known_ids = self._expert_pids(), {replica["id"] for replica in self._experts()}
        started = time.monotonic()
        self.deploy(experts=2)
        _await(lambda: any(map(is_connected, self._expert_pids() - known_pids)), f"rows for a new replica of {GROUP}")
        took_s = time.monotonic() - started
        computed = partial(self._rows_beside, known_ids)
        _await(computed, f"rows computed by the new replica of {GROUP}")
        self._take_away()
        return took_s

    def add_bare_replica(self) -> float:
        """Seconds until Serve calls a second replica running."""
        started = time.monotonic()
        self.deploy(bare=2)
        _await(lambda: self._bare_states() == ["RUNNING"] * 2, "a second bare replica")
        took_s = time.monotonic() - started
        self._take_away()
        return took_s

    def await_one_each(self) -> None:
        """Wait until there is one replica of each."""
        _await(lambda: self._bare_states() == ["RUNNING"], "one bare replica")
        _await(lambda: [each["state"] for each in self._experts()] == ["ready"], f"one replica of {GROUP}")

    def _take_away(self) -> None:
        self.deploy()
        self.await_one_each()

    def _experts(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self._url}/v1/cluster", timeout=ANSWER_S) as response:
            groups = json.load(response)["groups"]
        found: list[dict[str, Any]] = next(group["replicas"] for group in groups if group["name"] == GROUP)
        return found

    def _rows_beside(self, known_ids: set[str]) -> int:
        """Rows that replicas other than the known ones have reported."""
        return sum(replica["rows"] or 0 for replica in self._experts() if replica["id"] not in known_ids)

    def _expert_pids(self) -> set[int]:
        return self._serve.replica_pids(self._application["name"], GROUP)

    def _bare_states(self) -> list[str]:
        return self._serve.replica_states(BARE["name"]).get("Bare", [])


def _await(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + REPLICA_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {REPLICA_S:g} s: {what}")
        time.sleep(POLL_S)

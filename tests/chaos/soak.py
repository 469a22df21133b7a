"""Mixed load for minutes while something fails every few seconds, and the accounts at the end.

    python -m tests.chaos.soak --seconds 1200

Prints what happened, a table, and one line of JSON; exits with 1 where a request was lost, an answer differed or
something was left over. `make soak` runs it; tests/chaos/test_failures.py runs a minute of it.

Clients ask for completions of a few lengths, greedy and seeded, streamed and whole, and hang up on some. Every request
ends in exactly one way: finished (and then its text is compared), cancelled by its client, refused with 429, or failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.processes import Footprint, footprint
from tests.chaos.running import Cluster, cluster
from tests.chaos.streams import Asked, Told, ask
from tests.chaos.troubles import TROUBLES
from tests.e2e.load import PROMPTS
from tests.serving import wait_for

CLIENTS = 12
LENGTHS = (8, 40, 160)
TROUBLE_EVERY_S = 10.0
CANCELLED_SHARE = 0.15
LATEST_CANCEL_S = 1.5
RSS_GROWTH = 0.05
FILES_GROWTH, THREADS_GROWTH = 0.05, 0.05
IDLE_S = 30.0
WARM_UP_S = 30.0


@dataclass
class Accounts:
    """Of all requests. sent: begun; the other counts are how they ended. different: texts that were not as before."""

    sent: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def lost(self) -> int:
        """Requests that ended in no way, or (below zero) in more than one."""
        return self.sent - self.finished - self.cancelled - self.refused - len(self.failures)


@dataclass
class Report:
    """What a soak found. kinds: what of -> its footprint before and after. left: what idle routers still hold."""

    seconds: float
    accounts: Accounts
    troubles: Counter[str]
    kinds: dict[str, tuple[Footprint, Footprint]]
    left: list[str]
    slowest_s: float

    def growth(self, of: Callable[[Footprint], int]) -> float:
        """Of all processes together: 0.05 is 5 % more than after the warm-up."""
        before, after = (sum(of(pair[side]) for pair in self.kinds.values()) for side in (0, 1))
        return after / max(before, 1) - 1

    @property
    def faults(self) -> list[str]:
        """Why this is no success; empty where it is."""
        accounts = self.accounts
        growths = {
            "resident memory": (self.growth(lambda each: each.rss_bytes), RSS_GROWTH),
            "open files": (self.growth(lambda each: each.files), FILES_GROWTH),
            "threads": (self.growth(lambda each: each.threads), THREADS_GROWTH),
        }
        return [
            *([f"{accounts.lost} requests are unaccounted for"] if accounts.lost else []),
            *(["nothing was finished"] if not accounts.finished else []),
            *[f"failed: {each}" for each in accounts.failures[:5]],
            *[f"other text: {each}" for each in accounts.different[:5]],
            *[f"left over: {each}" for each in self.left],
            *[f"{what} grew by {grown:.1%}" for what, (grown, most) in growths.items() if grown > most],
        ]

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        accounts = {
            name: len(value) if isinstance(value, list) else value for name, value in asdict(self.accounts).items()
        }
        return {
            "seconds": round(self.seconds, 1),
            **accounts,
            "lost": self.accounts.lost,
            "troubles": sum(self.troubles.values()),
            "slowest_s": round(self.slowest_s, 2),
            "rss_growth": round(self.growth(lambda each: each.rss_bytes), 4),
            "files_growth": round(self.growth(lambda each: each.files), 4),
            "threads_growth": round(self.growth(lambda each: each.threads), 4),
            "faults": self.faults,
        }

    def table(self) -> str:
        """For people."""
        accounts = self.accounts
        lines = [
            f"requests   {accounts.sent} sent: {accounts.finished} finished, {accounts.cancelled} hung up on, "
            f"{accounts.refused} refused, {len(accounts.failures)} failed, {accounts.lost} unaccounted for",
            f"answers    {accounts.tokens} tokens, {len(accounts.different)} texts not as without failures; "
            f"slowest request {self.slowest_s:.1f} s",
            f"troubles   {', '.join(f'{count} x {name}' for name, count in sorted(self.troubles.items())) or 'none'}",
            "",
            f"{'processes':<12} {'RSS MiB':>16} {'files':>14} {'threads':>14}",
        ]
        for name, (before, after) in sorted(self.kinds.items()):
            lines.append(
                f"{name:<12} {before.rss_bytes >> 20:>7} ->{after.rss_bytes >> 20:>6} "
                f"{before.files:>6} ->{after.files:>5} {before.threads:>6} ->{after.threads:>5}"
            )
        return "\n".join(lines)


class _Clients:
    """Threads that ask until told to stop."""

    def __init__(self, port: int, wanted: Mapping[Asked, str], seed: int) -> None:
        self.accounts = Accounts()
        self.slowest_s = 0.0
        self._port = port
        self._wanted = wanted
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(random.Random(f"{seed} {number}"),))
            for number in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when the last answers are there."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, chance: random.Random) -> None:
        choices = list(self._wanted)
        while not self._stop.is_set():
            self._ask(chance.choice(choices), chance)

    def _ask(self, asked: Asked, chance: random.Random) -> None:
        hang_up = threading.Event()
        timer = threading.Timer(chance.uniform(0, LATEST_CANCEL_S), hang_up.set)
        if chance.random() < CANCELLED_SHARE:
            timer.start()
        with self._lock:
            self.accounts.sent += 1
        began = time.monotonic()
        told = ask(self._port, asked, Told(), stop=hang_up)
        timer.cancel()
        with self._lock:
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self._account(asked, told, hung_up=hang_up.is_set())
        if told.status == 429:
            self._stop.wait(float(told.retry_after or 1))

    def _account(self, asked: Asked, told: Told, *, hung_up: bool) -> None:
        accounts, wanted = self.accounts, self._wanted[asked]
        if told.status == 429:
            accounts.refused += 1
        elif told.whole and told.tokens == asked.max_tokens:
            accounts.finished += 1
            accounts.tokens += told.tokens
            if told.text != wanted:
                accounts.different.append(f"{asked}: {told.text!r} instead of {wanted!r}")
        elif hung_up and not told.error:
            accounts.cancelled += 1
            if not wanted.startswith(told.text):
                accounts.different.append(f"{asked}: {told.text!r} begins otherwise than {wanted!r}")
        else:
            accounts.failures.append(
                f"{asked}: status {told.status}, {told.error or told.finish}, {told.tokens} tokens"
            )


def soak(running: Cluster, seconds: float, *, seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Report:
    """Load and trouble for so long, on a cluster that is whole; it is whole again at the end.

    Before it everything is warmed up by the same load without trouble: what grows then is no leak.
    """
    wanted = _references(running.port)
    warm_up = _Clients(running.port, wanted, seed)
    warm_up.start()
    time.sleep(min(WARM_UP_S, seconds / 8))
    warm_up.stop()
    _idle(running)
    before = _footprints(running)
    chance, troubles = random.Random(seed), Counter[str]()
    clients = _Clients(running.port, wanted, seed + 1)
    started = time.monotonic()
    clients.start()
    try:
        while (left_s := started + seconds - time.monotonic()) > 0:
            time.sleep(min(TROUBLE_EVERY_S, left_s))
            if left_s > TROUBLE_EVERY_S:
                name = chance.choice(TROUBLES)(running, chance)
                troubles[name] += 1
                say(f"{time.monotonic() - started:6.0f} s  {name}  ({clients.accounts.finished} finished)")
    finally:
        clients.stop()
    took_s = time.monotonic() - started
    running.sizes()
    running.restored()
    # Successors of what was killed are cold: the same warm-up as those had that are compared with.
    again = _Clients(running.port, wanted, seed)
    again.start()
    time.sleep(min(WARM_UP_S, seconds / 8))
    again.stop()
    left = _idle(running)
    after = _footprints(running)
    kinds = {name: (before.get(name, Footprint(0, 0, 0)), found) for name, found in after.items()}
    accounts = clients.accounts
    accounts.failures += [f"in the warm-up: {each}" for part in (warm_up, again) for each in part.accounts.failures]
    return Report(took_s, accounts, troubles, kinds, left, clients.slowest_s)


def _references(port: int) -> dict[Asked, str]:
    prompts = [*PROMPTS["python"][:3], *PROMPTS["chinese"][:3]]
    asked = [Asked(prompt, seed, length) for prompt in prompts for seed in (None, 11) for length in LENGTHS]
    wanted: dict[Asked, str] = {}
    for each in asked:
        told = ask(port, each, Told())
        if not told.whole:
            raise RuntimeError(f"{each} is not answered before anything has failed: {told.error}")
        wanted[each] = told.text
    return wanted


def _idle(running: Cluster) -> list[str]:
    """Wait until no router holds anything; what they hold after `IDLE_S`, one sentence each."""
    try:
        wait_for(lambda: len(running.idle_routers()) == running.routers_wanted, IDLE_S, "idle routers")
    except AssertionError:
        idle = running.idle_routers()
        return [f"{each}" for each in running.elastic.cluster()["routers"] if each not in idle]
    return []


def _footprints(running: Cluster) -> dict[str, Footprint]:
    processes = running.processes
    kinds = {**processes.kinds(), "proxy": processes.proxies, "controller": processes.controllers}
    return {name: footprint(pids) for name, pids in kinds.items()}


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.chaos.soak", description="Load under failures, with accounts.")
    parser.add_argument("--seconds", type=float, default=1200, help="of load and trouble")
    parser.add_argument("--seed", type=int, default=0, help="of the clients and the troubles")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as running:
        report = soak(running, options.seconds, seed=options.seed, say=lambda line: print(line, flush=True))
    print(f"\n{report.table()}\n\n{json.dumps(report.as_json())}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Mixed load for minutes while something fails every few seconds, and the accounts at the end.

    python -m tests.chaos.soak --seconds 1200

Prints what happened, a table, and one line of JSON; exits with 1 where a request was lost, an answer differed or
something was left over. `make soak` runs it; tests/chaos/test_failures.py runs a minute of it.

Clients ask for completions of a few lengths, greedy and seeded, streamed and whole, and hang up on some. Every request
ends in exactly one way: finished (and then its text is compared), cancelled by its client, refused with 429, or failed.
Every request has a name, under which the server's own log must have it exactly once, with the same status.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.chaos.access_log import AccessLog, contradictions
from tests.chaos.accounts import Accounts, Report
from tests.chaos.processes import Footprint, footprint
from tests.chaos.running import Cluster, cluster
from tests.chaos.streams import Asked, Told, ask
from tests.chaos.troubles import Troubles
from tests.e2e.load import PROMPTS
from tests.serving import wait_for

CLIENTS = 12
LENGTHS = (8, 40, 160)
TROUBLE_EVERY_S = 10.0
CANCELLED_SHARE = 0.15
LATEST_CANCEL_S = 1.5
LOGGED_S = 15.0
"""Until the server has noticed that the last client has hung up, and has written so."""
IDLE_S = 30.0
WARM_UP_S = 30.0


class _Clients:
    """Threads that ask until told to stop."""

    def __init__(self, port: int, wanted: Mapping[Asked, str], seed: int, name: str) -> None:
        self._name = name
        self.accounts = Accounts()
        self.slowest_s = 0.0
        self.statuses: dict[str, str] = {}
        """Of every request: what its client was told, "" for one that hung up or was told nothing."""
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
            request_id = f"{self._name}-{self.accounts.sent}"
        began = time.monotonic()
        told = ask(self._port, asked, Told(), stop=hang_up, request_id=request_id)
        timer.cancel()
        with self._lock:
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self._account(asked, told, hung_up=hang_up.is_set())
            self.statuses[request_id] = str(told.status) if told.whole or told.status not in (0, 200) else ""
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
    warm_up = _Clients(running.port, wanted, seed, "warm-up")
    warm_up.start()
    time.sleep(min(WARM_UP_S, seconds / 8))
    warm_up.stop()
    _idle(running)
    before = _footprints(running)
    troubles, clients = Troubles(running, seed), _Clients(running.port, wanted, seed + 1, "soak")
    started = time.monotonic()
    clients.start()
    try:
        while (left_s := started + seconds - time.monotonic()) > 0:
            time.sleep(min(TROUBLE_EVERY_S, left_s))
            if left_s > TROUBLE_EVERY_S:
                what = troubles.make()
                say(f"{time.monotonic() - started:6.0f} s  {what}  ({clients.accounts.finished} finished)")
    finally:
        clients.stop()
    took_s = time.monotonic() - started
    running.sizes()
    running.restored()
    # Successors of what was killed are cold: the same warm-up as those had that are compared with.
    again = _Clients(running.port, wanted, seed, "afterwards")
    again.start()
    time.sleep(min(WARM_UP_S, seconds / 8))
    again.stop()
    left = _idle(running)
    after = _footprints(running)
    kinds = {name: (before.get(name, Footprint()), found) for name, found in after.items()}
    accounts = clients.accounts
    accounts.failures += [f"in the warm-up: {each}" for part in (warm_up, again) for each in part.accounts.failures]
    told = {**warm_up.statuses, **clients.statuses, **again.statuses}
    differing = _contradictions(running, told)
    return Report(
        took_s, accounts, troubles.done, troubles.missed, kinds, left, clients.slowest_s, len(told), differing
    )


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


def _contradictions(running: Cluster, told: Mapping[str, str]) -> list[str]:
    """Between clients and server, once both have had their say."""
    log = AccessLog(running.processes.root)
    with suppress(AssertionError):
        wait_for(lambda: log.statuses().keys() >= told.keys(), LOGGED_S, "everything in the log")
    return contradictions(told, log.statuses())


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

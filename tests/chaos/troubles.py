"""What the soak does to a running cluster every few seconds, drawn by a seed: each is done, undone, and has a name.

A trouble says whom it hit. One that found nobody at work, or nothing to change, has hit nobody and proves nothing.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from tests.chaos.processes import kill, stopped
from tests.chaos.running import GROUPS, REPLICAS, Cluster
from tests.serving import wait_for

HANG_S = 3.0
SCALED_S = 20.0
"""Until a replica more runs, or one less, on a busy machine."""
Trouble = Callable[[Cluster, random.Random], str]
"""Returns what happened; "" where it hit nobody."""


class Troubles:
    """Made one after the other, every kind once before any of them comes again. done, missed: kind -> how often."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.done, self.missed = Counter[str](), Counter[str]()
        self._cluster = cluster
        self._chance = random.Random(seed)
        self._coming: list[str] = []

    def make(self) -> str:
        """The next one; what it was, for people."""
        if not self._coming:
            self._coming = self._chance.sample(list(KINDS), len(KINDS))
        kind = self._coming.pop()
        hit = KINDS[kind](self._cluster, self._chance)
        (self.done if hit else self.missed)[kind] += 1
        # Both know every kind that came: what never hits is a fault.
        return hit or f"{kind}: nobody was hit"


def _expert_killed(cluster: Cluster, chance: random.Random) -> str:
    """One replica of a group, in the middle of its work."""
    group = chance.choice(GROUPS)
    victims = cluster.working(group)[-1:]
    kill(victims)
    return f"kill {group}" if victims else ""


def _expert_hangs(cluster: Cluster, chance: random.Random) -> str:
    """One replica of a group, in the middle of its work, for `HANG_S`."""
    group = chance.choice(GROUPS)
    victims = cluster.working(group)[-1:]
    with stopped(victims):
        time.sleep(HANG_S)
    return f"stop {group}" if victims else ""


def _router_killed(cluster: Cluster, chance: random.Random) -> str:
    """One of the routers that run something."""
    busy = cluster.busy_routers()
    victims = [chance.choice(busy)] if busy else []
    kill(victims)
    return "kill Router" if victims else ""


def _router_hangs(cluster: Cluster, chance: random.Random) -> str:
    """One of the routers that run something, for longer than the ingress is patient."""
    busy = cluster.busy_routers()
    victims = [chance.choice(busy)] if busy else []
    with stopped(victims):
        time.sleep(HANG_S)
    return "stop Router" if victims else ""


def _routers_hang(cluster: Cluster, chance: random.Random) -> str:  # noqa: ARG001 - every trouble's signature
    """All of them, for longer than the ingress is patient: there is no other one to go to."""
    busy, routers = cluster.busy_routers(), cluster.processes.of("Router")
    with stopped(routers):
        time.sleep(HANG_S)
    return f"stop all {len(routers)} routers" if busy else ""


def _directory_killed(cluster: Cluster, chance: random.Random) -> str:  # noqa: ARG001 - every trouble's signature
    """The only one."""
    victims = cluster.processes.of("Directory")
    kill(victims)
    return "kill Directory" if victims else ""


def _scaled_up(cluster: Cluster, chance: random.Random) -> str:
    return _scaled(cluster, chance, REPLICAS + 1)


def _scaled_down(cluster: Cluster, chance: random.Random) -> str:
    return _scaled(cluster, chance, REPLICAS - 1)


def _scaled(cluster: Cluster, chance: random.Random, count: int) -> str:
    """Other numbers of replicas: `count` of one group, one more, as many as usual or one less of routers."""
    group, routers = chance.choice(GROUPS), REPLICAS + chance.choice((-1, 0, 1))
    before = len(cluster.processes.of(group))
    cluster.sizes(experts={group: count}, routers=routers)
    with suppress(AssertionError):
        wait_for(lambda: len(cluster.processes.of(group)) == count, SCALED_S, f"{group} of {count}")
    now = len(cluster.processes.of(group))
    return f"{group} from {before} to {count}, routers to {routers}" if before != count == now else ""


KINDS: dict[str, Trouble] = {
    "kill expert": _expert_killed,
    "stop expert": _expert_hangs,
    "kill router": _router_killed,
    "stop router": _router_hangs,
    "stop all routers": _routers_hang,
    "kill directory": _directory_killed,
    "scale up": _scaled_up,
    "scale down": _scaled_down,
}

"""What the soak does to a running cluster every few seconds, drawn by a seed: each is done, undone, and has a name."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.chaos.processes import kill, stopped
from tests.chaos.running import GROUPS, REPLICAS, Cluster

HANG_S = 3.0
Trouble = Callable[[Cluster, random.Random], str]


def expert_killed(cluster: Cluster, chance: random.Random) -> str:
    """One replica of a group."""
    group = chance.choice(GROUPS)
    kill(_one(cluster, group, chance))
    return f"kill {group}"


def expert_hangs(cluster: Cluster, chance: random.Random) -> str:
    """One replica of a group, for `HANG_S`."""
    group = chance.choice(GROUPS)
    with stopped(_one(cluster, group, chance)):
        time.sleep(HANG_S)
    return f"stop {group}"


def router_killed(cluster: Cluster, chance: random.Random) -> str:
    """One of the routers."""
    kill(_one(cluster, "Router", chance))
    return "kill Router"


def router_hangs(cluster: Cluster, chance: random.Random) -> str:
    """One of the routers, for longer than the ingress is patient."""
    with stopped(_one(cluster, "Router", chance)):
        time.sleep(HANG_S)
    return "stop Router"


def directory_killed(cluster: Cluster, chance: random.Random) -> str:  # noqa: ARG001 - every trouble's signature
    """The only one."""
    kill(cluster.processes.of("Directory"))
    return "kill Directory"


def scaled(cluster: Cluster, chance: random.Random) -> str:
    """Other numbers of replicas of a group and of routers, one more, as usual, or one less."""
    group, count = chance.choice(GROUPS), REPLICAS + chance.choice((-1, 1))
    routers = REPLICAS + chance.choice((-1, 0, 1))
    cluster.sizes(experts={group: count}, routers=routers)
    return f"{group} to {count}, routers to {routers}"


TROUBLES: tuple[Trouble, ...] = (expert_killed, expert_hangs, router_killed, router_hangs, directory_killed, scaled)


def _one(cluster: Cluster, deployment: str, chance: random.Random) -> list[int]:
    found = cluster.processes.of(deployment)
    return [chance.choice(found)] if found else []

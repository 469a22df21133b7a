"""The GPUs there are, and the text a user writes them in. Pure.

Memory and bandwidth of known types are those of their makers' data sheets (NVIDIA and AMD product pages, SXM where a
card comes in several forms). A GB is 10^9 bytes here; most cards have a little more than their name says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.config import HOME_POOL, POOL_NAME
from cluster.errors import ConfigError
from cluster.placement.devices import MOST_DEVICES, parse_bytes

GB = 10**9

KNOWN: dict[str, tuple[float, float]] = {
    "t4": (16 * GB, 320 * GB),
    "v100": (16 * GB, 900 * GB),
    "l4": (24 * GB, 300 * GB),
    "a10g": (24 * GB, 600 * GB),
    "l40s": (48 * GB, 864 * GB),
    "rtx3090": (24 * GB, 936 * GB),
    "rtx4070": (12 * GB, 504 * GB),
    "rtx4090": (24 * GB, 1008 * GB),
    "a100": (80 * GB, 2039 * GB),
    "a10040g": (40 * GB, 1555 * GB),
    "h100": (80 * GB, 3350 * GB),
    "h200": (141 * GB, 4800 * GB),
    "mi300x": (192 * GB, 5300 * GB),
}
"""Name -> bytes of memory, bytes a second from it."""

_FORM = "NAME[=MEMORY[@BANDWIDTH]][:COUNT] as in h100:2, rtx4070=12GB:4 or mine=24GB@600GB:2"


@dataclass(frozen=True)
class GpuPool:
    """`count` equal GPUs: one node pool. bandwidth: bytes a second from its memory, None where nobody says."""

    name: str
    count: int
    memory_bytes: float
    bandwidth: float | None


def parse_gpus(text: str) -> tuple[GpuPool, ...]:
    """Pools from `rtx4070=12GB:4,h100=80GB:2`.

    A known type needs no memory; where one is given that is not its own, nothing is known of its bandwidth either.

    Raises:
        ConfigError: one sentence.
    """
    pools = tuple(_pool(part.strip()) for part in text.split(","))
    if len({pool.name for pool in pools}) < len(pools):
        raise ConfigError(f"--gpus: {text!r} names a kind twice; allowed: each kind once.")
    if sum(pool.count for pool in pools) > MOST_DEVICES:
        raise ConfigError(f"--gpus: {text!r} are too many; allowed: up to {MOST_DEVICES}.")
    return pools


def _pool(part: str) -> GpuPool:
    kind, _, count = part.partition(":")
    name, _, size = kind.partition("=")
    memory, _, bandwidth = size.partition("@")
    if not POOL_NAME.fullmatch(name) or name == HOME_POOL:
        raise ConfigError(f"--gpus: {part!r} is not allowed; allowed: {_FORM}, the name in lower-case letters, digits.")
    if not size and name not in KNOWN:
        raise ConfigError(f"--gpus: {name!r} is not known; give its memory as in {name}=24GB, or one of {_known()}.")
    if ":" in part and (not count.isdecimal() or not 1 <= int(count) <= MOST_DEVICES):
        raise ConfigError(f"--gpus: the count {count!r} of {part!r} is not allowed; allowed: 1 to {MOST_DEVICES}.")
    known_memory, known_bandwidth = KNOWN.get(name, (math.nan, math.nan))
    given = parse_bytes("--gpus", memory) if size else known_memory
    if given < GB and not memory.endswith("B"):
        raise ConfigError(f"--gpus: {part!r} has {given:g} bytes; did you mean {name}={memory}GB?")
    if bandwidth or "@" in size:
        speed: float | None = parse_bytes("--gpus", bandwidth)
    else:
        speed = known_bandwidth if given == known_memory else None
    return GpuPool(name, int(count or 1), given, speed)


def _known() -> str:
    return ", ".join(sorted(KNOWN))

"""The devices a plan may use, and the text a user writes them in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.config import HOME_POOL, POOL_NAME
from cluster.errors import PlacementError

MOST_DEVICES = 512
"""The search takes four times as long for twice the devices: 5 s for 512 of them and 58 layers of 256 experts."""
MOST_SLOTS = 1 << 20

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}


@dataclass(frozen=True)
class DeviceKind:
    """`count` equal devices. Each holds one replica of one group.

    name: of the pool they form. slots: experts of one layer that fit, the same in every layer.
    speed: rows of one expert layer a second, or in any unit all kinds share.
    """

    name: str
    count: int
    slots: int
    speed: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """What `parse_devices` needs for kinds that name no slots, or memory instead of slots.

    layers: MoE layers of the model. slots: of kinds that name none. memory_bytes: the same, as memory.
    expert_bytes: of one expert of one layer; memory needs it.
    """

    layers: int
    slots: int | None = None
    memory_bytes: float | None = None
    expert_bytes: float | None = None

    def in_memory(self, where: str, memory_bytes: float) -> int:
        """Experts of each layer that fit: 80e9 bytes hold 31 of 44e6 bytes in each of 58 layers.

        Raises:
            PlacementError: nobody said how large an expert is, or not one fits.
        """
        if self.expert_bytes is None:
            raise PlacementError(f"{where}: a memory says how many experts fit only with --expert-bytes.")
        slots = int(memory_bytes // (self.expert_bytes * self.layers))
        if slots < 1:
            raise PlacementError(
                f"{where}: {memory_bytes:.0f} bytes do not hold one expert of each of {self.layers} layers; "
                f"allowed: at least {self.expert_bytes * self.layers:.0f} bytes."
            )
        return min(slots, MOST_SLOTS)


def parse_devices(text: str, sizes: Sizes) -> tuple[DeviceKind, ...]:
    """Kinds from `32` or `24:9` or `l4:24:9:1.0,h100:8:80GB:2.5`: [name:]count[:slots[:speed]], separated by commas.

    Slots are a number of experts per layer, or a memory. A name before nothing but a count is a name: `l4:24`.

    Raises:
        PlacementError: one sentence.
    """
    kinds = tuple(_kind(part.strip(), sizes) for part in text.split(","))
    names = [kind.name for kind in kinds]
    if len(set(names)) < len(names):
        raise PlacementError(f"--budget: {text!r} names a kind of device twice; allowed: each kind once.")
    if sum(kind.count for kind in kinds) > MOST_DEVICES:
        raise PlacementError(f"--budget: {text!r} are too many devices; allowed: up to {MOST_DEVICES}.")
    return kinds


def parse_bytes(key: str, text: str) -> float:
    """Bytes from `80e9`, `80GB` or `80GiB`.

    Raises:
        PlacementError: naming `key`.
    """
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        size = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise PlacementError(f"{key}: {text!r} is not allowed; allowed: bytes above 0 as in 80e9, 80GB or 80GiB.")
    return size


def _kind(part: str, sizes: Sizes) -> DeviceKind:
    fields = [field.strip() for field in part.split(":")]
    name = HOME_POOL if fields[0][:1] in "-+.0123456789" else fields.pop(0)
    if not POOL_NAME.fullmatch(name) or not 1 <= len(fields) <= 3:
        raise PlacementError(
            f"--budget: {part!r} is no kind of device; allowed: [name:]count[:slots[:speed]] as in l4:24:9:1.0, "
            "the name in lower-case letters and digits."
        )
    count, slots, speed = (*fields, "", "")[:3]
    return DeviceKind(
        name,
        _whole(part, "count", count, MOST_DEVICES),
        _slots(part, slots, sizes),
        _speed(part, speed) if speed else 1.0,
    )


def _slots(part: str, text: str, sizes: Sizes) -> int:
    if text.endswith("B"):
        return sizes.in_memory("--budget", parse_bytes("--budget", text))
    if text:
        return _whole(part, "slots", text, MOST_SLOTS)
    if sizes.slots is not None:
        return sizes.slots
    if sizes.memory_bytes is not None:
        return sizes.in_memory("--memory", sizes.memory_bytes)
    raise PlacementError(
        f"--budget: {part!r} does not say how many experts of a layer fit on a device; "
        "give slots as in l4:24:9, or --slots, or --memory with --expert-bytes."
    )


def _whole(part: str, key: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise PlacementError(f"--budget: the {key} {text!r} of {part!r} is not allowed; allowed: 1 to {most}.")
    return int(text)


def _speed(part: str, text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise PlacementError(f"--budget: the speed {text!r} of {part!r} is not allowed; allowed: a number above 0.")
    return speed

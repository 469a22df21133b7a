"""Experts to devices of unequal memory and speed where no load is known: every expert counts the same. Pure.

The planner of `cluster.placement` counts in *slots*, experts that a device holds in every layer alike: of Mixtral-8x7B
one is 11 GB, and a card of 12 GB would hold none. Here a device holds `places`, experts of one layer, and may hold one
more in some layers than in others: places lie on a line that runs through the layers again and again, and every device
takes a piece of it.

    3 layers of 4 experts, shares 5, 4, 3:   a a a | a a b | b b b | c c c
    of which layer 0 is  a a b c,  layer 1  a a b c,  layer 2  a b b c
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.placement import Experts


def shares(places: int, room: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """How many of `places` each device holds: in proportion to its speed, but never beyond its room.

    Needs sum(room) >= places, and speeds above 0. Invariant: the shares sum to `places`.
    """
    left, speed, exact = float(places), sum(speeds), [0.0] * len(room)
    # Those with the least room for their speed fill first; what they cannot take goes to the others.
    for device in sorted(range(len(room)), key=lambda d: room[d] / speeds[d]):
        exact[device] = min(room[device], left * speeds[device] / speed if speed > 0 else left)
        left -= exact[device]
        speed -= speeds[device]
    whole = [min(room[device], int(share)) for device, share in enumerate(exact)]
    order = sorted(range(len(room)), key=lambda d: whole[d] - exact[d])
    while missing := places - sum(whole):
        for device in [d for d in order if whole[d] < room[d]][:missing]:
            whole[device] += 1
    return whole


def deal(experts_per_layer: Mapping[int, int], parts: Sequence[int]) -> tuple[Experts, ...]:
    """The experts of each device: so many as `parts` says, in every layer one more or less than in any other at most.

    That holds where all layers have equally many experts. parts must sum to the experts of all layers.
    """
    line = [
        (layer, expert)
        for expert in range(max(experts_per_layer.values()))
        for layer, count in experts_per_layer.items()
        if expert < count
    ]
    dealt: list[Experts] = []
    start = 0
    for part in parts:
        taken: dict[int, list[int]] = {}
        for layer, expert in line[start : start + part]:
            taken.setdefault(layer, []).append(expert)
        dealt.append({layer: tuple(ids) for layer, ids in sorted(taken.items())})
        start += part
    return tuple(dealt)

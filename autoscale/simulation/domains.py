"""Which domain a request is of, and which groups a domain uses. Pure but for reading load and placement files.

Dimensions: D domains, P layer patterns, E experts of a layer, G groups.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from autoscale.simulation.scenario import Drift, ModelShape, ZipfLoads
from cluster import placement
from cluster.config import resolve
from cluster.errors import PlacementError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PLACEMENTS = ("by_domain", "balanced", "contiguous")
DRIFT_STEP_S = 5.0


def expert_loads(model: ModelShape, seed: int) -> Floats:
    """[D, P, E]: the share of a domain's rows of a layer that each expert takes; sums to 1 over E.

    Raises:
        PlacementError: the load file is missing or does not fit the model.
    """
    if isinstance(model.loads, ZipfLoads):
        return _zipf(model.loads, model.experts, np.random.default_rng([seed, 1]))
    path = resolve(model.loads)
    placement.read_load(path)
    loads = np.array(list(json.loads(path.read_text(encoding="utf-8"))["domains"].values()), dtype=np.float64)
    if loads.ndim != 3 or loads.shape[2] != model.experts or not np.all(loads.sum(axis=2) > 0):
        raise PlacementError(f"the load file {path} must hold {model.experts} loads per layer, not all of them 0.")
    shares: Floats = loads / loads.sum(axis=2, keepdims=True)
    return shares


def _zipf(spec: ZipfLoads, experts: int, rng: np.random.Generator) -> Floats:
    weights = 1.0 / np.arange(1, experts + 1) ** spec.exponent
    ranked = np.stack([rng.permutation(weights) for _ in range(spec.domains * spec.patterns)])
    shares: Floats = ranked.reshape(spec.domains, spec.patterns, experts) / weights.sum()
    return shares


def group_shares(loads: Floats, groups: int, name: str) -> Floats:
    """[D, P, G]: the share of a domain's rows that each group takes, where experts are placed as `name` says.

    name: `contiguous`, `balanced` (equal load over all domains), `by_domain`, or a placement file.
    by_domain: experts of a layer in the order of the domain that uses them most and, there, of their load; cut into
    equal runs. So a domain keeps few groups busy, the same ones in all layers, and these are what gets replicas.

    Raises:
        PlacementError: the file is missing or does not fit.
    """
    patterns, experts = int(loads.shape[1]), int(loads.shape[2])
    layers = dict.fromkeys(range(patterns), experts)
    if name == "contiguous":
        placed = placement.contiguous(layers, groups)
    elif name == "balanced":
        placed = placement.balanced(layers, groups, {p: loads[:, p].sum(axis=0).tolist() for p in layers})
    elif name == "by_domain":
        placed = placement.explicit(layers, _by_domain(loads, groups))
    else:
        written = placement.read_groups(resolve(name))
        named = sorted({layer for group in written for layer in group})
        if len(written) != groups or len(named) != patterns:
            raise PlacementError(f"the placement {name} must have {groups} groups and {patterns} layers.")
        order = {layer: index for index, layer in enumerate(named)}
        placed = placement.explicit(layers, [{order[layer]: ids for layer, ids in group.items()} for group in written])
    shares = np.zeros((len(loads), patterns, groups))
    for layer, owners in placed.owner.items():
        for group in range(groups):
            shares[:, layer, group] = loads[:, layer, np.array(owners) == group].sum(axis=1)
    return shares


def _by_domain(loads: Floats, groups: int) -> list[dict[int, list[int]]]:
    chosen: list[dict[int, list[int]]] = [{} for _ in range(groups)]
    for pattern in range(loads.shape[1]):
        layer = loads[:, pattern]
        order = np.lexsort((-layer.max(axis=0), layer.argmax(axis=0)))
        for group, ids in enumerate(np.array_split(order, groups)):
            chosen[group][pattern] = ids.tolist()
    return chosen


def imbalance(shares: Floats) -> float:
    """The busiest group's load as a multiple of the mean's, averaged over domains and layers; 1 is even."""
    return float(shares.max(axis=2).mean() * shares.shape[2])


def mixture(domains: int, drift: Drift, duration_s: float, seed: int) -> Floats:
    """[K, D]: the share of each domain at every `DRIFT_STEP_S`.

    The domains stand on a circle and the light turns once in a period: weight exp(focus * cos(angle to the light)).
    A second, slower turn of a seeded phase makes no two turns alike.
    """
    rng = np.random.default_rng([seed, 2])
    times = np.arange(int(duration_s / DRIFT_STEP_S) + 2) * DRIFT_STEP_S
    light = 2 * np.pi * times / drift.period_s + 0.7 * np.sin(
        2 * np.pi * times / (2.7 * drift.period_s) + rng.uniform(0, 2 * np.pi)
    )
    angle = light[:, None] + rng.uniform(0, 2 * np.pi) - 2 * np.pi * np.arange(domains) / domains
    weights = np.exp(drift.focus * np.cos(angle))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def domains_of(arrival_s: Floats, mix: Floats, seed: int) -> Ints:
    """[N]: the domain of each request, drawn from the mixture of its moment."""
    rng = np.random.default_rng([seed, 3])
    upto = np.cumsum(mix, axis=1)[(arrival_s / DRIFT_STEP_S).astype(np.int64)]
    drawn: Ints = (rng.random(len(arrival_s))[:, None] > upto[:, :-1]).sum(axis=1)
    return drawn

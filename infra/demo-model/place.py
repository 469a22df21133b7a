"""An explicit placement of the demo model's experts into four groups, one per domain and one for what is left.

    python infra/demo-model/place.py

reads expert_load.json (written by evaluate.py), writes placement.yaml, and prints the share of each domain's rows that
each group receives. Pure but for `main`: it knows neither the model nor the cluster.

Dimension letters: L layers, E experts, D domains, G groups.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TypedDict

import yaml

HERE = Path(__file__).parent
Placement = list[dict[int, list[int]]]  # [G], each {layer: expert ids}


class ExpertLoad(TypedDict):
    """Measured load; `domains` maps a name to shares [L][E], each layer summing to 1."""

    model: str
    layers: list[int]
    domains: dict[str, list[list[float]]]


def place(load: ExpertLoad) -> Placement:
    """Group d for the d-th domain of `load`, and a last group for the rest; E / G experts of each layer in each group.

    An expert is worth to domain d what d sends it beyond what the other domains send it on average, so that an expert
    which all domains use goes to the last group, where it is worth 0. Each layer is solved exactly.
    """
    groups: Placement = [{} for _ in range(len(load["domains"]) + 1)]
    for index, layer in enumerate(load["layers"]):
        shares = [per_layer[index] for per_layer in load["domains"].values()]  # [D][E]
        values = []
        for expert in zip(*shares, strict=True):
            total = sum(expert)
            values.append([own - (total - own) / (len(expert) - 1) for own in expert] + [0.0])
        for expert_id, group in enumerate(assign(values)):
            groups[group].setdefault(layer, []).append(expert_id)
    return groups


def assign(values: list[list[float]]) -> list[int]:
    """The group of each expert that maximises the summed values [E][G], with E / G experts in each group.

    Exact: the best way to place experts e, e+1, ... depends only on the slots left in each group, which for 16 experts
    in 4 groups is at most 5^4 states. Raises ValueError if E is not a multiple of G.
    """
    experts, groups = len(values), len(values[0])
    if experts % groups:
        raise ValueError(f"{experts} experts cannot be dealt evenly to {groups} groups")

    @cache
    def best(slots: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        expert = experts - sum(slots)
        if expert == experts:
            return 0.0, ()
        options = []
        for group in (g for g in range(groups) if slots[g]):
            value, rest = best((*slots[:group], slots[group] - 1, *slots[group + 1 :]))
            options.append((values[expert][group] + value, (group, *rest)))
        return max(options)

    return list(best((experts // groups,) * groups)[1])


def group_shares(load: ExpertLoad, placement: Placement) -> dict[str, list[float]]:
    """Share of each domain's rows that each group receives, averaged over layers: {domain: [G]}, each summing to 1."""
    layers = load["layers"]

    def share(shares: list[list[float]], group: dict[int, list[int]]) -> float:
        return sum(shares[i][expert] for i, layer in enumerate(layers) for expert in group[layer]) / len(layers)

    return {domain: [share(shares, group) for group in placement] for domain, shares in load["domains"].items()}


def main() -> None:
    load: ExpertLoad = json.loads((HERE / "expert_load.json").read_text())
    placement = place(load)
    names = [*load["domains"], "rest"]
    lines = [f"# Written by place.py from expert_load.json. Groups in order: {', '.join(names)}.", "groups:"]
    lines += [f"  - {yaml.safe_dump(group, default_flow_style=True, width=1000).strip()}" for group in placement]
    (HERE / "placement.yaml").write_text("\n".join(lines) + "\n")
    for domain, shares in group_shares(load, placement).items():
        print(f"{domain:8}", "  ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True)))


if __name__ == "__main__":
    main()

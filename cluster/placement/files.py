"""Reading and writing the files of placements and loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import PlacementError
from cluster.placement.partition import Placement


def read_load(path: Path) -> dict[int, list[float]]:
    """Read a load file: `{"layers": [1, 2], "domains": {name: [[load per expert] per layer]}}`, summed."""
    data = _read(path)
    try:
        layers = [_whole(layer) for layer in data["layers"]]
        per_domain = [[[float(x) for x in row] for row in rows] for rows in data["domains"].values()]
        return {
            layer: [sum(column) for column in zip(*(rows[i] for rows in per_domain), strict=True)]
            for i, layer in enumerate(layers)
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise PlacementError(f"the load file {path} must hold `layers` and `domains` with a load per expert.") from None


def read_groups(path: Path) -> list[dict[int, list[int]]]:
    """Read a placement file: `groups: [{layer: [expert ids]}, ...]`."""
    data = _read(path)
    try:
        return [
            {_whole(layer): [_whole(expert) for expert in ids] for layer, ids in group.items()}
            for group in data["groups"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PlacementError(
            f"the placement file {path} must hold `groups`, a list of {{layer: [expert ids]}}."
        ) from None


def placement_text(placement: Placement, about: Sequence[str], as_json: bool) -> str:
    """A placement file that `read_groups` takes. about: lines at its head, as comments where the format has them."""
    if as_json:
        groups = [{str(layer): list(ids) for layer, ids in group.items()} for group in placement.groups]
        return json.dumps({"about": list(about), "groups": groups}) + "\n"
    head = [f"# {line}".rstrip() for line in about]
    groups_text = [
        "  - {" + ", ".join(f"{layer}: {list(ids)}" for layer, ids in group.items()) + "}" for group in placement.groups
    ]
    return "\n".join([*head, "groups:", *groups_text]) + "\n"


def _whole(value: object) -> int:
    """`value` where it is a whole number; JSON has strings for keys, so digits count as one."""
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _read(path: Path) -> Any:
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        # PyYAML reads JSON too, but takes seconds for the load file of a large model.
        return json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise PlacementError(f"the file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise PlacementError(f"the file {path} is not valid {kind}.") from None

"""Names in Terraform files against a provider's schema, without Terraform: resource types, arguments, nested blocks.

It knows no expressions: whether a value has the right type, or a reference leads somewhere, only Terraform says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2

MARK = "__is_block__"
META_ARGUMENTS = {"count", "for_each", "depends_on", "provider"}
META_BLOCKS = {"lifecycle", "provisioner", "connection", "timeouts"}


def complaints(folder: Path, schemas: dict[str, Any]) -> list[str]:
    """One sentence for every name in `folder`'s resources that `schemas` (resource type -> schema) does not know."""
    return [text for path in sorted(folder.glob("*.tf")) for text in _of_file(path, schemas)]


def _of_file(path: Path, schemas: dict[str, Any]) -> Iterator[str]:
    for kind, name, body in resources(path):
        where = f"{path.name}: {kind}.{name}"
        if kind not in schemas:
            yield f"{where}: no such resource type"
            continue
        inner = {key: value for key, value in body.items() if key not in META_ARGUMENTS | META_BLOCKS}
        yield from _of_block(where, inner, schemas[kind]["block"])


def resources(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(type, name, body) of every resource in a file."""
    with path.open() as file:
        parsed = hcl2.load(file)
    for entry in parsed.get("resource", []):
        for kind, named in _items(entry):
            for name, body in _items(named):
                yield kind, name, body


def _of_block(where: str, body: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """`body` against the schema of one block; arguments and blocks inside it too."""
    attributes, blocks = schema.get("attributes", {}), schema.get("block_types", {})
    arguments, nested = _parts(body)
    for name in arguments:
        if name in blocks:
            yield f"{where}: {name} is a block, not an argument"
        elif name not in attributes:
            yield f"{where}: no argument {name}"
        elif not (attributes[name].get("required") or attributes[name].get("optional")):
            yield f"{where}: {name} is the provider's to say"
        elif attributes[name].get("deprecated"):
            yield f"{where}: {name} is deprecated"
    for name in {name for name, attribute in attributes.items() if attribute.get("required")} - arguments:
        yield f"{where}: argument {name} is missing"
    for name, inner in nested:
        if name not in blocks:
            yield f"{where}: no block {name}"
        else:
            yield from _of_block(f"{where}.{name}", inner, blocks[name]["block"])
    for name in {name for name, block in blocks.items() if block.get("min_items")} - {name for name, _ in nested}:
        yield f"{where}: block {name} is missing"


def _parts(body: dict[str, Any]) -> tuple[set[str], list[tuple[str, dict[str, Any]]]]:
    """Names of arguments, and the blocks with what is inside; a dynamic block counts as the block it makes."""
    arguments, nested = set(), []
    for key, value in _items(body):
        if key == "dynamic":
            for dynamic in value:
                nested += [(name, content) for name, made in _items(dynamic) for content in made["content"]]
        elif isinstance(value, list) and value and all(isinstance(each, dict) and each.get(MARK) for each in value):
            nested += [(key, each) for each in value]
        else:
            arguments.add(key)
    return arguments, nested


def _items(block: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a parsed block; the parser keeps the quotes of labels and adds __names__ of its own."""
    return ((name.strip('"'), value) for name, value in block.items() if not name.startswith("__"))

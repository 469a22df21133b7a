"""The text of a policy file -> plain data, with what YAML leaves open closed: a key counts once, sizes are bounded.

The bounds keep whoever reads a policy, the Serve controller first of all, from harm by an odd file: libyaml's composer
overflows the stack on some ten thousand open brackets, and a few lines of aliases to aliases stand for billions of
values. The events of the parser show both before anything is built.
"""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.sentences import Fault, one_line, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 50_000
"""Keys and values, aliases written out. A rule with every key has 50."""

# libyaml where PyYAML was built with it: ten times faster, the same result.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_START = "a mapping that begins with `version: 1`"


def parse(raw: bytes) -> dict[Any, Any]:
    """The mapping a policy file holds.

    Raises:
        ConfigError: it holds none; one sentence per error, joined by newlines.
    """
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"the file has more than {MAX_BYTES} bytes; allowed: up to {MAX_BYTES}.")
    try:
        text = raw.decode("utf-8-sig")
        _measure(text)
        document, repeated = _construct(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file is not valid UTF-8 at byte {error.start}; allowed: UTF-8 text.") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_sentence(error)) from None
    except ConfigError:
        raise
    except Exception as error:
        # PyYAML's constructors raise whatever Python raises on a value that does not suit its tag, as `2024-13-45`.
        raise ConfigError(f"the file is not valid YAML: {_short(str(error))}; allowed: YAML.") from None
    if repeated:
        raise ConfigError("\n".join(repeated))
    if document is None:
        raise ConfigError(f"the file is empty; allowed: {_START}.")
    if not isinstance(document, dict):
        raise ConfigError(f"the file holds the value {shown(document)}; allowed: {_START}.")
    return document


def _measure(text: str) -> None:
    """Refuse text that is too deep or stands for too many values. Reads the parser's events, builds nothing."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            # An alias inside its own anchor has no size yet: it would contain itself.
            total += sizes.get(event.anchor or "", MAX_VALUES + 1)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        place = f"at line {event.start_mark.line + 1}" if event.start_mark else "somewhere"
        if len(open_nodes) > MAX_DEPTH:
            raise ConfigError(f"the file nests more than {MAX_DEPTH} levels deep {place}; allowed: {MAX_DEPTH} levels.")
        if total > MAX_VALUES:
            raise ConfigError(
                f"the file holds more than {MAX_VALUES} values, aliases written out, {place}; allowed: {MAX_VALUES}."
            )


def _construct(text: str) -> tuple[Any, list[str]]:
    """The document, and a sentence for each key that is written twice."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        repeated = [] if root is None else _repeated(root, "")
        return (None if root is None or repeated else loader.construct_document(root)), repeated
    finally:
        loader.dispose()


def _repeated(node: yaml.Node, place: str) -> list[str]:
    """A sentence for each key that a mapping below `node` has twice. YAML readers would take the last, silently."""
    found: list[str] = []
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            found += _repeated(item, f"{place}{index}.")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            identity, name = (key.tag, key.value), f"{place}{one_line(key.value)}"
            if identity in lines:
                allowed = f"the key stands in line {lines[identity] + 1} already; write it once"
                again = value.value if isinstance(value, yaml.ScalarNode) else {}
                found.append(Fault(name, again, allowed).sentence())
            lines.setdefault(identity, key.start_mark.line)
            found += _repeated(value, f"{name}.")
    return found


def _yaml_sentence(error: yaml.YAMLError) -> str:
    """PyYAML's messages take several lines; the problem and its line are what matters."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"the file is not valid YAML{place}: {_short(problem)}; allowed: YAML."


def _short(message: str) -> str:
    """One line of somebody else's message, which may repeat what the file says."""
    return textwrap.shorten(message, 200, placeholder=" ...")

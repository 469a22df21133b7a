"""Makes the parts of the chart that have their source elsewhere, and tells which of them are out of date.

    python helm/generate.py            writes them
    python helm/generate.py --check    exits 1 and names them

- values.schema.json from values-schema.yaml and the classes that read arguments and policies;
- the table of values in README.md from the `# --` comments of values.yaml;
- copies of files that the chart needs inside its package: variables, rules, dashboards.

Knows neither Helm nor Kubernetes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHART = HERE / "expertscale"
COPIES = {
    "deployments/serve.env": "files",
    "threads.env": "files",
    "infra/prometheus/*.yaml": "files/prometheus",
    "infra/grafana/*.json": "files/grafana",
}
"""Pattern in the repository -> folder in the chart. A pattern that matches nothing (yet) copies nothing."""
BEGIN, END = "<!-- values: made by helm/generate.py -->\n", "<!-- end of values -->\n"
# Where pydantic cannot express a bound on a checked number it writes the bound's own name, which no schema knows.
BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


class OutOfDateError(Exception):
    """A source that cannot be turned into what the chart needs."""


def generated() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    files = {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": with_table(readme, table(values)),
    }
    return files | {target: source.read_text(encoding="utf-8") for source, target in copies()}


def copies() -> list[tuple[Path, Path]]:
    """(source, target) of every file that is copied."""
    found = []
    for pattern, folder in COPIES.items():
        found += [(source, CHART / folder / source.name) for source in sorted(ROOT.glob(pattern)) if _wanted(source)]
    return found


def _wanted(source: Path) -> bool:
    """Of infra/prometheus only files of rules, not a Prometheus's own config nor tests of rules."""
    if source.suffix != ".yaml":
        return True
    document = yaml.safe_load(source.read_text(encoding="utf-8"))
    return isinstance(document, dict) and set(document) == {"groups"}


def stale() -> list[Path]:
    """Generated files that differ from what they should be, missing and superfluous ones too."""
    differing = {path for path, text in generated().items() if not path.is_file() or path.read_text("utf-8") != text}
    return sorted(differing | superfluous())


def superfluous() -> set[Path]:
    """Copies in the chart whose sources are gone."""
    there = {path for path in (CHART / "files").rglob("*") if path.is_file()}
    return there - {target for _, target in copies()}


def values_schema() -> dict[str, Any]:
    """The JSON schema of the values."""
    from autoscale.spec import PolicySpec
    from cluster.config import AppConfig

    source = yaml.safe_load((HERE / "values-schema.yaml").read_text(encoding="utf-8"))
    schema: dict[str, Any] = _strict(source)
    for model in (AppConfig, PolicySpec):
        own = model.model_json_schema()
        definitions = {**own.pop("$defs"), model.__name__: own}
        clash = schema["$defs"].keys() & definitions.keys()
        if any(schema["$defs"][name] != _plain(definitions[name]) for name in clash):
            raise OutOfDateError(f"$defs: {sorted(clash)} mean two things.")
        schema["$defs"] |= {name: _plain(definition) for name, definition in definitions.items()}
    # The chart's own business: pods listen on their own address; keys are named by `security`, the model by `model`.
    del schema["$defs"]["ExpertsSpec"]["properties"]["host"]
    for name in ("AppConfig", "ModelSpec", "SecuritySpec"):
        del schema["$defs"][name]
    return schema


def _strict(node: Any) -> Any:
    """`strict: KEYS` -> an object with these keys and no others."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items() if key != "strict"}
    if "strict" in node:
        properties = {key: _strict(value) for key, value in node["strict"].items()}
        made |= {"type": "object", "additionalProperties": False, "properties": properties}
    return made


def _plain(node: Any, keys_are_names: bool = False) -> Any:
    """A pydantic schema without prose and defaults, which the chart's users read elsewhere."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if keys_are_names:
        return {name: _plain(value) for name, value in node.items()}
    prose = {"title", "default", "description"}
    return {
        BOUNDS.get(key, key): _plain(value, keys_are_names=key in {"properties", "patternProperties"})
        for key, value in node.items()
        if key not in prose
    }


def table(values: str) -> str:
    """The table of all values, made from their `# --` comments.

    Raises:
        OutOfDateError: a value has no comment, and no part of it has one.
    """
    lines = values.splitlines()
    rows = ["| value | default | what it is |", "|---|---|---|"]
    for path, key_line, value in _documented(yaml.compose(values), lines, ()):
        comment = lines[key_line - 1].strip().removeprefix("# -- ").replace("|", "\\|")
        default = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
        rows.append(f"| `{'.'.join(path)}` | `{default}` | {comment} |")
    return "\n".join(rows) + "\n"


def _documented(node: Any, lines: list[str], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int, Any]]:
    found: list[tuple[tuple[str, ...], int, Any]] = []
    for key, value in node.value:
        here = (*path, key.value)
        above = lines[key.start_mark.line - 1].strip() if key.start_mark.line else ""
        if above.startswith("# -- "):
            loader = yaml.SafeLoader("")
            found.append((here, key.start_mark.line, loader.construct_document(value)))
        elif isinstance(value, yaml.MappingNode) and value.value:
            found += _documented(value, lines, here)
        else:
            raise OutOfDateError(f"values.yaml: {'.'.join(here)} has no `# --` comment in the line above.")
    return found


def with_table(readme: str, rows: str) -> str:
    """`readme` with `rows` between its two marks."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise OutOfDateError(f"README.md has not the lines {BEGIN.strip()!r} and {END.strip()!r}.")
    return before + BEGIN + "\n" + rows + "\n" + END + after


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: python helm/generate.py [--check]", file=sys.stderr)
        return 2
    if arguments:
        outdated = stale()
        for path in outdated:
            print(f"{path.relative_to(ROOT)} is out of date; run `python helm/generate.py`.", file=sys.stderr)
        return 1 if outdated else 0
    for path in superfluous():
        path.unlink()
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

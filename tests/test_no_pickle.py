"""Nothing that comes from outside is ever unpickled or evaluated: read off the sources (a second)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path for package in ("cluster", "deployments", "autoscale") for path in sorted((ROOT / package).rglob("*.py"))
]

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
YAML_UNSAFE = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
LOADERS_UNSAFE = {"Loader", "UnsafeLoader", "FullLoader", "CLoader", "CUnsafeLoader", "CFullLoader"}


def findings(source: str) -> Iterator[str]:
    """What in `source` turns bytes into objects or code of the sender's choice."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[-1] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            yield from sorted(names & MODULES)
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1]
            if node.attr in MODULES or (owner == "yaml" and node.attr in YAML_UNSAFE | LOADERS_UNSAFE):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS:
        yield name
    if name in ("torch.load", "torch.jit.load", "torch.package.PackageImporter"):
        yield name
    if name.split(".")[-1] in ("load", "from_pretrained", "from_config") and given.get("weights_only") == "False":
        yield f"{name} with weights_only=False"
    if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
        yield f"{name} with {given}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_unpickles_and_evaluates_nothing(path: Path) -> None:
    assert list(findings(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import ray.cloudpickle",
        "from ray import cloudpickle as p",
        "from pickle import loads",
        "import ray\nray.cloudpickle.loads(b)",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(findings(source))


def test_what_is_harmless_is_left_alone() -> None:
    assert list(findings("model.eval()\nyaml.safe_load(t)\nre.compile('x')\njson.load(f)\nnumpy.load(p)")) == []

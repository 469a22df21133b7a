"""Who may import whom, read off the sources: deployments -> cluster <- autoscale. A second; nothing is imported."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "deployments", "autoscale")
WEB = {"aiohttp", "fastapi", "http", "httpx", "openai", "starlette", "uvicorn"}
PARTS = ("deployments.ingress", "deployments.router", "deployments.experts")

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

ENGINE = [f"deployments.router.{name}" for name in ("engine", "scheduler", "sequence", "sampler", "page_pool", "step")]
LIGHT = ["cluster.load_plan", "deployments.experts.weights", "deployments.experts.ffn"]
NO_TORCH = [
    "autoscale.metering",
    "autoscale.cluster_budget",
    "autoscale.observer",
    "autoscale.policy",
    "autoscale.policy_file",
    "autoscale.prewarming",
    "autoscale.schedule",
    "autoscale.simulate",
    "cluster.config",
    "cluster.decisions",
    "cluster.health_reasons",
    "cluster.loads",
    "cluster.membership",
    "cluster.nodes.keeper",
    "cluster.metering",
    "cluster.placement",
    "cluster.snapshot",
    "deployments.directory_core",
    "deployments.directory_metering",
    "deployments.generation",
    "deployments.router.latency",
    "deployments.router.page_pool",
    "deployments.router.routing",
    "deployments.router.scheduler",
    "deployments.router.sequence",
]
RAY_SHELLS = {
    "cluster.fabric.ray_references",
    "cluster.ray_metrics",
    "deployments.app",
    "deployments.config_file",
    "deployments.directory",
    "deployments.experts.deployment",
    "deployments.ingress.deployment",
    "deployments.ingress.handles",
    "deployments.node",
    "deployments.router.affinity",
    "deployments.router.deployment",
    "deployments.serve_run",
    "deployments.targets",
    "autoscale.cluster_link",
    "autoscale.controller_link",
}
KUBERNETES = "cluster.nodes.api"
LOCAL_TRANSPORT = "deployments.router.runtime"
"""With `transport: local` a router holds the experts itself, so this one file may know how they compute."""


def names_in(nodes, module):
    """Dotted names that import statements among `nodes` refer to, `from a import b` as both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if SOURCES[module].name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imports(module):
    """Everything `module` imports, wherever in the file."""
    return frozenset(names_in(ast.walk(ast.parse(SOURCES[module].read_text())), module))


@cache
def imports_at_once(module):
    """What is imported with `module` itself: not in functions, and not for type checkers only."""
    found, open_nodes = [], [ast.parse(SOURCES[module].read_text())]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            open_nodes += node.orelse
            continue
        found.append(node)
        open_nodes += ast.iter_child_nodes(node)
    return frozenset(names_in(found, module))


def loaded_with(module):
    """Top-level names of everything that importing `module` imports, through our own modules."""
    seen, outside, waiting = set(), set(), [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in imports_at_once(current):
            if name in SOURCES:
                waiting.append(name)
            elif name.split(".")[0] not in PACKAGES:
                outside.add(name.split(".")[0])
        waiting += [parent for parent in (current.rpartition(".")[0],) if parent in SOURCES]
    return outside


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def package_of(module):
    return module.split(".")[0]


@pytest.mark.parametrize("module", SOURCES)
def test_deployments_and_autoscale_know_cluster_and_never_each_other(module):
    allowed = {"cluster": {"cluster"}, "deployments": {"deployments", "cluster"}, "autoscale": {"autoscale", "cluster"}}
    ours = {package_of(name) for name in imports(module) if package_of(name) in PACKAGES}
    assert ours <= allowed[package_of(module)]


def test_only_the_app_knows_all_deployments():
    def parts_known_to(module):
        return {part for part in PARTS if any(within(name, part) for name in imports(module))}

    for module in SOURCES:
        home = {part for part in PARTS if within(module, part)}
        extra = parts_known_to(module) - home
        if module == LOCAL_TRANSPORT:
            used = {name for name in imports(module) if within(name, "deployments.experts")}
            assert all(name.split(".")[2] in ("ffn", "weights") for name in used if name in SOURCES)
        elif module == "deployments.app":
            assert extra == set(PARTS)
        else:
            assert not extra, f"{module} imports {extra}"


def test_nobody_imports_the_app_except_its_launcher():
    importers = {module for module in SOURCES if any(within(name, "deployments.app") for name in imports(module))}
    assert importers <= {"deployments.app", "deployments.launch"}


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_knows_no_http_and_no_ray(module):
    assert not loaded_with(module) & (WEB | {"ray"})
    assert not {package_of(name) for name in imports(module)} & (WEB | {"ray"})


@pytest.mark.parametrize("module", LIGHT)
def test_what_an_expert_replica_starts_with_does_not_load_transformers(module):
    assert "transformers" not in loaded_with(module)
    assert "transformers" not in {package_of(name) for name in imports(module)}


@pytest.mark.parametrize("module", ["deployments.experts.deployment", "deployments.experts.replica"])
def test_an_expert_replica_loads_no_opentelemetry_unless_traces_are_on(module):
    assert "opentelemetry" not in loaded_with(module)


def test_experts_know_no_sequences():
    for module in SOURCES:
        if within(module, "deployments.experts"):
            assert "deployments.generation" not in imports(module)


@pytest.mark.parametrize("module", NO_TORCH)
def test_plain_nouns_load_neither_torch_nor_ray_nor_transformers(module):
    assert not loaded_with(module) & {"torch", "ray", "transformers"}


def test_ray_is_known_to_the_shells_only():
    assert {module for module in SOURCES if "ray" in {package_of(name) for name in imports(module)}} <= RAY_SHELLS


def test_one_function_imports_the_kubernetes_client_and_only_when_it_is_called():
    assert {module for module in SOURCES if "kubernetes" in {package_of(name) for name in imports(module)}} == {
        KUBERNETES
    }
    assert not any("kubernetes" in loaded_with(module) for module in SOURCES)


def test_cluster_knows_no_serve():
    for module in SOURCES:
        if package_of(module) == "cluster" and module != "cluster.ray_metrics":
            assert not any(within(name, "ray.serve") for name in imports(module))


def test_no_rule_is_about_a_file_that_is_not_there():
    assert {*ENGINE, *LIGHT, *NO_TORCH, *RAY_SHELLS, KUBERNETES, LOCAL_TRANSPORT} <= set(SOURCES)

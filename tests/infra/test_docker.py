"""infra/docker/Dockerfile as far as it can be checked without a container engine: nothing here builds an image.

hadolint lints it; its parts are compared with what they repeat; commands of it that run without an image are run.
"""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
TARGETS = ("cpu", "cuda")
PIP_DRY_RUN = ("python", "-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check")
PINNED = ("ray", "torch", "transformers")


@dataclass(frozen=True)
class Instruction:
    """One instruction and the stage it belongs to."""

    stage: str
    word: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, comments dropped and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, text = line.strip().partition(" ")
        if word == "FROM":
            stage = text.partition(" AS ")[2]
        if word:
            found.append(Instruction(stage, word, text))
    return found


def of(word: str) -> list[Instruction]:
    return [instruction for instruction in instructions() if instruction.word == word]


def lineage(stage: str) -> list[str]:
    """`stage` and the stages it is made FROM."""
    bases = {each.stage: each.text.partition(" AS ")[0] for each in of("FROM")}
    names = [stage]
    while names[-1] in bases:
        names.append(bases[names[-1]])
    return names


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([str(hadolint), "--no-color", str(path)], capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11.13-slim-bookworm", "python:latest", "DL3007"),
        ("--no-install-recommends ", "", "DL3015"),
        ("WORKDIR /opt", "WORKDIR opt", "DL3000"),
        ("USER 1000:1000", "USER root", "DL3002"),
    ],
)
def test_hadolint_would_find(old: str, new: str, rule: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    changed = tmp_path / "Dockerfile"
    changed.write_text(text.replace(old, new))
    assert rule in lint(changed).stdout


def test_every_base_image_has_an_exact_tag() -> None:
    stages = {each.stage for each in of("FROM")}
    outside = {each.text.partition(" AS ")[0] for each in of("FROM")} - stages
    assert outside
    assert [image for image in outside if not re.fullmatch(r"[a-z0-9/.-]+:\d+\.\d+\.\d+[a-z0-9.-]*", image)] == []


def test_python_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [version] = re.findall(r"FROM python:(\d+\.\d+)\.", DOCKERFILE.read_text())
    assert version == project["tool"]["mypy"]["python_version"]
    assert project["project"]["requires-python"] == f">={version}"


def test_versions_come_from_the_projects_pins_and_from_nowhere_else() -> None:
    installs = [part for each in of("RUN") for part in each.text.split("&&") if "pip install" in part]
    assert len(installs) == 4
    for command in installs:
        assert "--constraint /opt/pins/constraints.txt" in command
        assert "--requirement" in command
        assert "==" not in command
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for name in PINNED:
        [pin] = [line for line in constraints if line.startswith(f"{name}==")]
        version = pin.partition("==")[2]
        assert any(re.fullmatch(rf"{name}(\[\w+\])?=={re.escape(version)}", line) for line in required), name


def test_its_own_commands_find_the_dependencies_and_the_pins_can_be_met(tmp_path: Path) -> None:
    [text] = [each.text for each in of("RUN") if "tomllib" in each.text]
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    listing = [part.strip() for part in text.split("&&") if "requirements.txt" in part and "pip" not in part]
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-euc", " && ".join(listing)], cwd=tmp_path, env=os.environ | {"PATH": python}, timeout=60, check=True
    )
    listed = (tmp_path / "requirements.txt").read_text().split()
    assert len(listed) > 10
    assert (tmp_path / "torch.txt").read_text().split() == [line for line in listed if line.startswith("torch==")]
    # Nothing is fetched: this environment was made from the same pins, so they must be met already.
    done = subprocess.run(
        [*PIP_DRY_RUN, "--constraint", "constraints.txt", "--requirement", "requirements.txt"],
        cwd=tmp_path,
        env=os.environ | {"PATH": python},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_the_environment_is_what_serve_env_and_threads_env_say() -> None:
    [text] = [each.text for each in of("ENV") if each.stage == "runtime"]
    inside = dict(pair.split("=", 1) for pair in text.split())
    for file in (ROOT / "deployments" / "serve.env", ROOT / "threads.env"):
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.partition("=")
                assert inside[name] == value, name
    assert inside["EXPERTSCALE_ROOT"] == inside["PYTHONPATH"] == "/opt/expertscale"


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_an_ordinary_user_with_packages_and_health_check(target: str) -> None:
    names = lineage(target)
    mine = [each for each in instructions() if each.stage in names]
    assert [each.text for each in mine if each.word == "USER"][-1] == "1000:1000"
    assert [each.word for each in mine].count("HEALTHCHECK") == 1
    copies = [each.text for each in mine if each.word == "COPY" and each.stage == target]
    assert copies[-1] == "--from=sources /opt/expertscale /opt/expertscale"
    assert "/opt/venv/bin:$PATH" in next(each.text for each in mine if each.word == "ENV")


@pytest.mark.parametrize("target", TARGETS)
def test_torch_has_a_layer_of_its_own_below_everything_else_that_is_installed(target: str) -> None:
    names = lineage(target)
    mine = sorted((each for each in instructions() if each.stage in names), key=lambda each: -names.index(each.stage))
    layers = [each.text for each in mine if each.word in {"RUN", "COPY"}]
    kinds = ["torch.txt" in each.split("--requirement")[-1] if "pip install" in each else None for each in layers]
    assert [kind for kind in kinds if kind is not None] == [True, False]
    assert not any("/opt/venv" in each for each in layers if each.startswith("--from"))
    assert layers.index("--from=sources /opt/expertscale /opt/expertscale") == len(layers) - 1


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    sources = [source for each in of("COPY") if not each.text.startswith("--from") for source in each.text.split()[:-1]]
    assert len(sources) >= 8
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert set(sources) == set(let_in)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(sources)


@pytest.fixture
def health() -> Iterator[tuple[int, list[int]]]:
    """A port whose /health answers with the status in the list."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], status
    server.shutdown()
    server.server_close()


def test_the_health_check_follows_health(health: tuple[int, list[int]]) -> None:
    if shutil.which("wget") is None:
        pytest.skip("wget is not installed; the image has it")
    port, status = health
    [check] = of("HEALTHCHECK")
    command = re.findall(r'"((?:[^"\\]|\\.)*)"', check.text.partition("CMD ")[2])
    codes = []
    for answer in (200, 503):
        status[0] = answer
        done = subprocess.run(command, env=os.environ | {"PORT": str(port)}, timeout=30, check=False)
        codes.append(done.returncode)
    assert codes == [0, 1]


def test_the_command_it_starts_is_the_launchers() -> None:
    [command] = of("CMD")
    assert command.text == '["python", "-m", "deployments.launch", "deployments/configs/demo.yaml"]'
    assert (ROOT / "deployments" / "launch.py").is_file()
    assert (ROOT / "deployments" / "configs" / "demo.yaml").is_file()

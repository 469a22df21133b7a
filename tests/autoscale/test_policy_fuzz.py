"""Any bytes at all in the policy file: a policy or sentences, in bounded time (10 s)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale.policy_file import PolicyFile, read
from autoscale.spec import PolicySpec
from cluster.errors import ConfigError

VALID = (Path(__file__).resolve().parents[2] / "autoscale" / "policies" / "default.yaml").read_bytes()
KEYS = [
    "version",
    "budget",
    "defaults",
    "groups",
    "router",
    "slo",
    "forecast",
    "schedule",
    "match",
    "cron",
    "min_replicas",
]
LONGEST_S = 5.0

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.dates() | st.binary(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | scalars, inner, max_size=4),
    max_leaves=20,
)
documents = st.fixed_dictionaries({"version": st.just(1)}, optional=dict.fromkeys(KEYS[1:], values)) | values
SYNTAX = st.text(alphabet="[]{}:,-&*!|>?#%@`'\"\\ \n\t0aé\x00\ufeff~<=.", max_size=200)


def judged(raw: bytes, folder: Path) -> str:
    """The file's error, "" where it is a policy. Whatever else is raised fails the test."""
    path = folder / "policy.yaml"
    path.write_bytes(raw)
    started = time.perf_counter()
    error = ""
    try:
        assert isinstance(read(path), PolicySpec)
    except ConfigError as refused:
        error = str(refused)
        assert error
    assert time.perf_counter() - started < LONGEST_S
    assert len(error) < 100_000
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


quiet = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)


@quiet
@given(raw=st.binary(max_size=400))
def test_any_bytes(raw: bytes, folder: Path) -> None:
    judged(raw, folder)


@quiet
@given(text=SYNTAX)
def test_any_yaml_syntax(text: str, folder: Path) -> None:
    judged(text.encode(), folder)


@quiet
@given(document=documents)
def test_any_document(document: Any, folder: Path) -> None:
    judged(yaml.safe_dump(document, allow_unicode=True).encode(), folder)


@quiet
@given(at=st.integers(0, len(VALID)), cut=st.integers(0, 30), put=st.binary(max_size=12))
def test_any_edit_of_a_valid_file(at: int, cut: int, put: bytes, folder: Path) -> None:
    judged(VALID[:at] + put + VALID[at + cut :], folder)


def laughs(levels: int) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, "version: 1"]).encode()


@pytest.mark.parametrize(
    "raw",
    [
        laughs(9),
        laughs(60),
        b"groups: &a [*a, *a]",
        b"&a {version: 1, defaults: {<<: *a}}",
        b"version: 1\ngroups: " + b"[" * 500_000,
        b"{a: " * 200_000,
        b"? " * 300_000,
        b"- " * 300_000,
        b"version: " + b"9" * 900_000,
        b"!!python/object/apply:os.system ['true']",
        b"version: !!python/name:os.system",
        b"&a" * 500_000,
        b"x" * (2 << 20),
    ],
    ids=range(13),
)
def test_a_file_made_to_hurt_is_refused_at_once(raw: bytes, folder: Path) -> None:
    assert judged(raw, folder)


def test_a_file_made_to_hurt_leaves_the_policy_in_force(folder: Path) -> None:
    path = folder / "policy.yaml"
    path.write_bytes(VALID)
    now = [0.0]
    file = PolicyFile(path, clock=lambda: now[0])
    before = file.spec
    assert before is not None
    for raw in (laughs(9), b"[" * 100_000, b"\xff\x00"):
        path.write_bytes(raw)
        now[0] += 10
        assert not file.refresh()
        assert file.spec is before
        assert file.error

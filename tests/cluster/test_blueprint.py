"""The blueprint: the same inputs give the same digest, any other input another; plans are cached until files change."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import checkpoint
from cluster.blueprint import Blueprint, make_blueprint
from cluster.config import parse_args
from tests.models import save


@pytest.fixture(autouse=True)
def plans_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTSCALE_ROOT", str(tmp_path))


def blueprint(folder: Path, dtype: str = "float32", groups: int = 4, **router: Any) -> Blueprint:
    model = {"path": str(folder), "dtype": dtype}
    return make_blueprint(parse_args({"model": model, "experts": {"groups": groups}, "router": router}))


def test_digest_depends_on_weights_placement_and_dtype_and_on_nothing_else(tmp_path: Path) -> None:
    one = save("olmoe", tmp_path / "one", torch.float32, seed=1)
    two = save("olmoe", tmp_path / "two", torch.float32, seed=2)
    digest = blueprint(one).digest
    assert len(digest) == 32
    assert blueprint(one, max_sequences=3).digest == digest
    others = [blueprint(two), blueprint(one, dtype="bfloat16"), blueprint(one, groups=2)]
    assert len({digest, *(other.digest for other in others)}) == 4


def test_plan_is_compiled_once_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("olmoe", tmp_path / "model", torch.float32)
    first = blueprint(folder)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(checkpoint, "compile_plan", refuse)
    assert blueprint(folder) == first
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(AssertionError, match="compiled again"):
        blueprint(folder)


def test_a_place_that_cannot_be_written_keeps_no_plan_and_nobody_from_starting(tmp_path: Path) -> None:
    folder = save("olmoe", tmp_path / "model", torch.float32)
    (tmp_path / ".expertscale").write_text("a file where the folder would be")
    assert blueprint(folder) == blueprint(folder)


def test_plan_is_compiled_again_by_another_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("olmoe", tmp_path / "model", torch.float32)
    blueprint(folder)
    monkeypatch.setattr("cluster.blueprint.version", lambda _: "0.0.0")

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(checkpoint, "compile_plan", refuse)
    with pytest.raises(AssertionError, match="compiled again"):
        blueprint(folder)


def test_it_survives_the_way_to_a_replica(tmp_path: Path) -> None:
    original = blueprint(save("olmoe", tmp_path / "model", torch.float32))
    arrived = pickle.loads(pickle.dumps(original))
    assert arrived == original
    assert arrived.plan.experts_per_layer == {0: 8, 1: 8}

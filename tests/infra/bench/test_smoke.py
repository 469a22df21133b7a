"""The harness runs every side at its smallest, as `make bench-smoke` does. About 30 s; speeds are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.bench.__main__ import SIDES, main
from infra.bench.context import Context
from infra.bench.figures import Figure

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 120
"""Twice what it promises: the machine is shared."""


@pytest.mark.timeout(2 * SECONDS + 30)
def test_every_side_runs_and_the_last_line_is_json(record_property: pytest.RecordProperty) -> None:
    command = [sys.executable, "-m", "infra.bench", "--smoke"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * SECONDS)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["smoke"] is True
    assert {figure["side"] for figure in result["figures"]} >= {"fabric", "growth", "routers", "invariance", "serving"}
    assert all(figure["value"] >= 0 for figure in result["figures"])
    assert all(f"{side} ..." in run.stderr for side in SIDES)
    assert all(figure["met"] is None for figure in result["figures"])
    assert "Loading weights" not in run.stderr
    assert result["failed"] == []
    assert result["cores"] >= 1
    assert set(result["environment"]) >= {"OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"}
    record_property("seconds", result["seconds"])
    assert result["seconds"] < SECONDS


def test_a_side_that_fails_loses_neither_the_others_nor_what_it_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: Context) -> Iterator[Figure]:
        yield Figure("fabric", "c", "w", 1.0, "s")
        raise ConnectionError("no more sockets")

    def working(_: Context) -> list[Figure]:
        return [Figure("growth", "c", "w", 2.0, "s")]

    for name, run in {"fabric": failing, "growth": working}.items():
        monkeypatch.setitem(sys.modules, f"infra.bench.{name}", SimpleNamespace(run=run))
    assert main(["--only", "fabric,growth"]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["failed"] == ["fabric"]
    assert [(figure["side"], figure["value"]) for figure in result["figures"]] == [("fabric", 1.0), ("growth", 2.0)]
    assert "Traceback" in printed.err
    assert "ConnectionError: no more sockets" in printed.err


def test_an_unknown_side_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "fabric,nonsense"])
    assert "unknown side 'nonsense'; allowed: fabric, transports" in capsys.readouterr().err

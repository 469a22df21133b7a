"""The harness runs every side at its smallest, as `make bench-smoke` does. About 30 s; speeds are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.bench.__main__ import SIDES, main

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60


@pytest.mark.timeout(4 * SECONDS)
def test_every_side_runs_and_the_last_line_is_json(record_property: pytest.RecordProperty) -> None:
    command = [sys.executable, "-m", "infra.bench", "--smoke"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * SECONDS)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["smoke"] is True
    assert {figure["side"] for figure in result["figures"]} >= {"fabric", "growth", "routers", "serving"}
    assert all(figure["value"] >= 0 for figure in result["figures"])
    assert all(f"{side} ..." in run.stderr for side in SIDES)
    record_property("seconds", result["seconds"])


def test_an_unknown_side_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "fabric,nonsense"])
    assert "unknown side 'nonsense'; allowed: fabric, transports" in capsys.readouterr().err

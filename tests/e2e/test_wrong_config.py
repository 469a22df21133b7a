"""`make serve` with a wrong config: one sentence, a failing exit status, and no Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.serving import ROOT, free_port


def test_make_serve_stops_before_ray_and_says_why(tmp_path: Path) -> None:
    text = (ROOT / "deployments" / "configs" / "demo.yaml").read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("groups: 4", "groups: 4\n        colour: blue"))
    environment = {**os.environ, "CONFIG": str(wrong), "PORT": str(free_port())}
    result = subprocess.run(["make", "serve"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    sentences = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(sentences) == 1
    assert sentences[0].startswith("experts.colour: unknown key; allowed here: auto_threshold_bytes, ")
    assert "ray" not in result.stdout.lower()

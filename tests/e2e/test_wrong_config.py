"""`make serve` with a wrong config: one sentence, a failing exit status, and no Ray."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from tests.serving import ROOT, free_port, launch


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


def test_a_taken_port_is_said_before_ray_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        demo = ROOT / "deployments" / "configs" / "demo.yaml"
        result = subprocess.run(launch(demo, port), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == f"PORT: {port} is taken on 127.0.0.1; choose another, as in `make serve PORT=8001`.\n"

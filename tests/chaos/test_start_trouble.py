"""An expert replica dies and its successor cannot load: everybody can see why, the others go on, and it recovers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.chaos.processes import kill
from tests.chaos.redeploying import redeployable
from tests.chaos.streams import Asked, Told, ask
from tests.e2e.conftest import CHECKPOINT, WholeModel
from tests.e2e.load import PROMPTS
from tests.serving import ROOT, Server, wait_for

SHARD = "model.safetensors"
ASKED = Asked(PROMPTS["python"][0], None, 12)
SEEN_S = 60.0
BACK_S = 100.0
"""Serve tries again at growing intervals."""


def test_a_replica_that_cannot_load_says_why_and_recovers_when_it_can(tmp_path: Path, whole_model: WholeModel) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)

    def own_copy(application: dict[str, Any]) -> None:
        application["args"]["model"]["path"] = str(checkpoint)
        application["args"]["experts"] |= {"groups": 2, "placement": "contiguous", "wait_s": SEEN_S + BACK_S}

    with redeployable(tmp_path, own_copy) as running:
        others = {name: pids for name, pids in running.pids().items() if name != "experts-1"}
        (checkpoint / SHARD).rename(tmp_path / SHARD)
        kill(list(running.pids()["experts-1"]))
        wait_for(lambda: health(running.server)["reasons"], SEEN_S, "a reason in /health")
        # The killed one is missed when its heartbeat has been missing for a while, perhaps after its successor failed.
        wait_for(lambda: health(running.server)["status"] != "ok", SEEN_S, "503 from /health")
        told = Told()
        client = threading.Thread(target=ask, args=(running.server.port, ASKED, told), daemon=True)
        client.start()

        shown = health(running.server)
        assert shown["missing"] == ["experts-1"]
        reason = f"experts-1 cannot start: the shard {checkpoint / SHARD} is missing"
        assert shown["reasons"].keys() == {"experts-1"}
        assert shown["reasons"]["experts-1"].startswith(reason)
        failures = {group["name"]: group["failures"] for group in running.cluster()["groups"]}
        assert failures["experts-0"] == []
        assert {(each["deployment"], each["reason"].startswith(reason)) for each in failures["experts-1"]} == {
            ("experts-1", True)
        }
        wait_for(lambda: reason in status(running.rest.dashboard_url), SEEN_S, "the reason in `serve status`")
        assert not told.finish, "it was answered without experts-1"

        (tmp_path / SHARD).rename(checkpoint / SHARD)
        wait_for(lambda: health(running.server)["status"] == "ok", BACK_S, "experts-1 back")
        client.join(BACK_S)
        assert told.whole, told.error
        assert told.text == whole_model.continued(ASKED.prompt, ASKED.max_tokens)
        assert health(running.server)["reasons"] == {}
        assert [group["failures"] for group in running.cluster()["groups"]] == [[], []]
        assert {name: running.pids()[name] for name in others} == others, "somebody else was restarted"


def health(server: Server) -> dict[str, Any]:
    """The body of `/health`, whatever its status."""
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
            body: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        body = json.load(error)
    return body


def status(dashboard_url: str) -> str:
    """What `serve status` prints, on one line."""
    command = [sys.executable, "-m", "ray.serve.scripts", "status", "--address", dashboard_url]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    # YAML folds long lines.
    return " ".join(done.stdout.replace("\\\n", "").split())

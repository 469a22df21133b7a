"""Fixed numbers: two routers share the groups, one of these with two replicas, on emulated devices; same answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml

from tests.e2e.conftest import MODEL, WholeModel
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

PROMPTS = tuple(f"{start}{number}" for number, start in enumerate(("import os\n", "The file ", "选项 ", "class A") * 2))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, folder = free_port(), tmp_path_factory.mktemp("shared")
    document = yaml.safe_load((ROOT / "deployments" / "configs" / "demo.yaml").read_text())
    args = document["applications"][0]["args"]
    args["experts"] |= {"replicas": {"experts-0": 2}, "emulate": {"rows_per_s": 4000}}
    args["router"] |= {"replicas": 2}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    with serving(launch(config, port), port, folder / "log") as server:
        yield server


def test_routers_and_replicas_share_the_work_and_agree_with_the_whole_model(
    server: Server, whole_model: WholeModel
) -> None:
    wait_for(lambda: len(server.get("/v1/cluster")["routers"]) == 2, 60, "both routers")
    wait_for(lambda: ready_replicas(server, "experts-0") == 2, 60, "both replicas of experts-0")

    def ask(prompt: str) -> str:
        # Eight sessions, so that affinity spreads them over the routers.
        session = {"x-session-id": f"session-{PROMPTS.index(prompt)}"}
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        return client.completions.create(**asked, extra_headers=session).choices[0].text

    base_url = f"{server.url}/v1"
    with (
        openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        texts = list(pool.map(ask, PROMPTS))
    assert texts == [whole_model.complete(prompt, 24) for prompt in PROMPTS]
    shared = wait_for(lambda: both_replicas_worked(server), 20, "rows on both replicas of experts-0")
    assert all(replica["emulated"] for replica in shared)


def test_the_rows_of_every_expert_are_recorded_in_the_format_that_placements_are_made_from(
    server: Server, tmp_path: Path
) -> None:
    def loads() -> dict[str, Any] | None:
        body: dict[str, Any] = server.get("/v1/cluster/loads")
        return body if body["domains"] and any(map(sum, body["domains"]["recorded"])) else None

    file = tmp_path / "loads.json"
    file.write_text(json.dumps(wait_for(loads, 30, "recorded loads")))
    command = [sys.executable, "-m", "cluster.placement", "plan", "--loads", str(file), "--budget", "6", "--slots", "4"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr
    assert "imbalance" in planned.stdout


def test_a_killed_router_costs_its_clients_nothing_but_time(server: Server) -> None:
    """The last test of the module: Serve starts another router, for nobody."""
    wait_for(lambda: len(server.get("/v1/cluster")["routers"]) == 2, 60, "both routers")
    started = threading.Barrier(len(PROMPTS) + 1)

    def ask(number: int, on_start: Callable[[], object]) -> str:
        asked = {"model": MODEL, "prompt": PROMPTS[number], "max_tokens": 150, "temperature": 0}
        extra = {"extra_body": {"ignore_eos": True}, "extra_headers": {"x-session-id": f"session-{number}"}}
        pieces = []
        for chunk in client.completions.create(**asked, **extra, stream=True):
            pieces.append(chunk.choices[0].text)
            if len(pieces) == 1:
                on_start()
        return "".join(pieces)

    base_url = f"{server.url}/v1"
    with (
        openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        wanted = list(pool.map(lambda number: ask(number, lambda: None), range(len(PROMPTS))))
        answers = [pool.submit(ask, number, started.wait) for number in range(len(PROMPTS))]
        started.wait(60)
        router_process(server).kill()
        assert [answer.result(120) for answer in answers] == wanted


def router_process(server: Server) -> psutil.Process:
    """The process of one Router replica."""
    for pid in server.pids():
        process = psutil.Process(pid)
        if "ServeReplica:expertscale:Router" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no router process")


def ready_replicas(server: Server, name: str) -> int:
    return sum(replica["state"] == "ready" for replica in replicas(server, name))


def both_replicas_worked(server: Server) -> list[dict[str, object]]:
    found = replicas(server, "experts-0")
    return found if len(found) == 2 and all(replica["rows"] for replica in found) else []


def replicas(server: Server, name: str) -> list[dict[str, object]]:
    groups = server.get("/v1/cluster")["groups"]
    found: list[dict[str, object]] = next(group["replicas"] for group in groups if group["name"] == name)
    return found

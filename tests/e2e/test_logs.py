"""The elastic demo with JSON logs: every line of every file one object, one id through proxy and ingress (30 s)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.config_file import ENCODING_VARIABLE
from deployments.ingress.request_ids import HEADER
from tests.chaos.access_log import serve_logs
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

ELASTIC = ROOT / "deployments" / "configs" / "elastic.yaml"
BODY = {"model": "expertscale-demo", "prompt": "canary-prompt def main():", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("logs") / "log"
    with serving(launch(ELASTIC, port), port, log, environment={ENCODING_VARIABLE: "JSON"}) as server:
        yield server


@pytest.fixture(scope="module")
def folder(server: Server) -> Path:
    return serve_logs(psutil.Process(server.process.pid))


def lines(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, object) of each line. Raises where a line is none."""
    return [(file.name, json.loads(line)) for file in folder.glob("*.log") for line in file.read_text().splitlines()]


def about(folder: Path, request_id: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, line) for name, line in lines(folder) if line.get("request_id") == request_id]


@pytest.mark.parametrize("stream", [False, True])
def test_one_id_leads_from_the_client_through_proxy_and_ingress(server: Server, folder: Path, stream: bool) -> None:
    given = f"order-66/{stream}"
    body = {**BODY, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={HEADER: given}, timeout=60)
    assert (answer.status_code, answer.headers.get_list(HEADER)) == (200, [given])
    wait_for(lambda: len(about(folder, given)) >= 3, 20, "the lines of proxy and ingress")
    found = about(folder, given)
    assert {name.partition("_")[0] for name, _ in found} == {"proxy", "replica"}
    [account] = [line for _, line in found if "outcome" in line]
    assert (account["outcome"], account["completion_tokens"], account["stream"]) == ("ok", 6, stream)
    assert (account["deployment"], account["levelname"]) == ("expertscale_Ingress", "INFO")
    assert 0 < account["first_token_s"] <= account["seconds"]


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [(200, "GET", "/health"), (200, "GET", "/dashboard"), (404, "GET", "/nowhere"), (405, "GET", "/v1/completions"),
     (400, "POST", "/v1/completions"), (200, "GET", "/-/routes")],
)  # fmt: skip
def test_every_answer_has_one_id_and_no_bad_one(server: Server, status: int, method: str, path: str) -> None:
    for given, kept in ((b"fine-id", True), (b"two words", False), (b"caf\xc3\xa9 \xff", False), (None, False)):
        headers = {} if given is None else {HEADER.encode(): given}
        answer = httpx.request(method, server.url + path, headers=headers, timeout=30)
        assert answer.status_code == status
        [told] = answer.headers.get_list(HEADER)
        assert told
        assert (told.encode() == given) is kept


def test_a_failed_request_is_found_where_it_failed(server: Server, folder: Path) -> None:
    given = "refused-1"
    answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "top_p": 7}, headers={HEADER: given}, timeout=30)
    assert answer.status_code == 400
    wait_for(lambda: any("code" in line for _, line in about(folder, given)), 20, "the ingress's line")
    assert {"invalid_value"} == {line["code"] for _, line in about(folder, given) if "code" in line}


def test_every_line_of_every_part_is_an_object_that_says_whose_it_is(folder: Path) -> None:
    found = lines(folder)
    for name, line in found:
        assert line["asctime"]
        assert line["levelname"]
        assert "message" in line
        if name.startswith("replica_"):
            assert line["deployment"]
            assert line["replica"]
    parts = {line["deployment"] for name, line in found if name.startswith("replica_")}
    assert {"expertscale_Ingress", "expertscale_Router", "expertscale_experts-0"} <= parts
    ours = [line["message"] for name, line in found if name.startswith("controller_")]
    assert any(message.startswith("policy file ") for message in ours), "the policy's own line, in the controller"
    assert not any("canary-prompt" in json.dumps(line) for _, line in found)
    assert not any("CALL" in line["message"] for _, line in found if "Router" in line.get("deployment", ""))


def test_the_terminal_stays_as_people_read_it(server: Server) -> None:
    shown = server.log.read_text()
    assert "curl " in shown
    assert not [line for line in shown.splitlines() if line.lstrip().startswith("{")]

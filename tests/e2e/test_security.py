"""A server that other machines may reach asks for keys, leaks nothing, and is never opened (one start, 30 s)."""

from __future__ import annotations

import copy
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deployments.ingress.keys import KeyLimits, KeyRecord, digest_of
from infra.bench.serve_rest import ServeRest
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

KEYS = {name: f"xs-canary-{name}-52c1d8" for name in ("alice", "bob", "carol", "root")}
PROMPT = "canary-prompt-61aa"
CHAT = {"model": "expertscale-demo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
VARIABLE = "EXPERTSCALE_CLUSTER_KEY"


def line(name: str, limits: KeyLimits = KeyLimits()) -> str:  # noqa: B008 - frozen
    return KeyRecord(name, digest_of(KEYS[name]), limits).line() + "\n"


@dataclass(frozen=True)
class Guarded:
    """A running server, the document it runs, and its files of hashed keys."""

    server: Server
    document: dict[str, Any]
    keys: Path

    def ask(self, path: str, name: str | None, body: object = None) -> tuple[int, str, dict[str, str]]:
        """(status, text, headers) of a request with somebody's key."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {KEYS[name]}"} if name else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode(), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("security")
    keys, admins = folder / "keys", folder / "admins"
    keys.write_text(line("alice") + line("bob", KeyLimits(requests_per_min=2)))
    admins.write_text(line("root"))
    document = yaml.safe_load((ROOT / "deployments" / "configs" / "demo.yaml").read_text())
    args = document["applications"][0]["args"]
    args["experts"] = {"groups": 1}
    args["security"] = {"api_keys_file": str(keys), "admin_keys_file": str(admins)}
    port = free_port()
    document["http_options"] = {"host": "0.0.0.0", "port": port}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    with serving(launch(config, port), port, folder / "log") as server:
        yield Guarded(server, document, keys)


def test_who_may_do_what(guarded: Guarded) -> None:
    chat, cluster = "/v1/chat/completions", "/v1/cluster"
    asked = [(chat, CHAT), ("/v1/models", None), ("/openapi.json", None), (cluster, None), ("/health", None)]
    assert [guarded.ask(path, None, body)[0] for path, body in asked] == [401, 401, 401, 401, 200]
    assert [guarded.ask(path, "alice", body)[0] for path, body in asked] == [200, 200, 200, 401, 200]
    assert [guarded.ask(path, "root", body)[0] for path, body in asked] == [200, 200, 200, 200, 200]


def test_a_limit_holds_and_an_edit_counts_from_the_next_request(guarded: Guarded) -> None:
    answers = [guarded.ask("/v1/chat/completions", "bob", CHAT) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert "requests_per_min is 2" in answers[2][1]
    assert 0 < int(answers[2][2]["retry-after"]) <= 30
    assert guarded.ask("/v1/models", "carol")[0] == 401
    guarded.keys.write_text(line("alice") + line("carol"))
    assert guarded.ask("/v1/models", "carol")[0] == 200
    assert guarded.ask("/v1/models", "bob")[0] == 401
    guarded.keys.write_text(f"{KEYS['bob']}\n")  # a key itself: refused, and the old ones stay
    assert guarded.ask("/v1/models", "carol")[0] == 200


def test_every_replica_has_the_key_of_this_start_and_no_file_has_it(guarded: Guarded) -> None:
    found = {}
    for pid in guarded.server.pids():
        with suppress(psutil.Error, IndexError):
            process = psutil.Process(pid)
            title = process.cmdline()[0]
            if ":experts-0" in title or ":Router" in title:
                found[title.split(":")[4]] = process.environ()[VARIABLE]
    assert sorted(found) == ["Router", "experts-0"]
    assert len(set(found.values())) == 1
    assert len(found["Router"]) == 64
    assert found["Router"] != os.environ.get(VARIABLE)
    leaks(guarded, [found["Router"]])


def leaks(guarded: Guarded, secrets: list[str]) -> None:
    """Fails where one of `secrets` stands in the terminal's output or in any log of this Ray."""
    files = [guarded.server.log]
    for pid in guarded.server.pids():
        with suppress(psutil.Error):
            for part in psutil.Process(pid).cmdline():
                if part.startswith("--session_dir="):
                    files += (path for path in Path(part.split("=", 1)[1], "logs").rglob("*") if path.is_file())
    assert any("replica_" in path.name and "Ingress" in path.name for path in files)
    for path in set(files):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_prompts_and_keys_are_in_no_log(guarded: Guarded) -> None:
    for body in (CHAT, CHAT | {"temperature": PROMPT}, CHAT | {"messages": PROMPT}, CHAT | {"stream": True}):
        guarded.ask("/v1/chat/completions", "root", body)
        guarded.ask(f"/v1/models/{PROMPT}?key={KEYS['root']}", "root")
    time.sleep(1)  # logs are written by other processes
    leaks(guarded, [PROMPT, *KEYS.values()])


def test_a_redeploy_without_keys_is_refused_by_the_ingress_itself(guarded: Guarded) -> None:
    document = copy.deepcopy(guarded.document)
    del document["applications"][0]["args"]["security"]
    rest = ServeRest(psutil.Process(guarded.server.process.pid))
    rest.deploy(document["applications"])

    def said() -> bool:
        request = urllib.request.Request(rest._url, headers=rest._headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return "can be reached from other machines and no API key is asked for" in response.read().decode()

    wait_for(said, 90, "serve status to say why the new Ingress does not start")
    assert guarded.ask("/v1/models", None)[0] == 401
    assert guarded.ask("/v1/models", "root")[0] == 200

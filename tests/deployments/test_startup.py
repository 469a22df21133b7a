"""What `make serve` prints when it is ready or never will be; the rest of it is tested end to end."""

from __future__ import annotations

import socket
import threading

import pytest

from cluster.config import AppConfig, parse_args
from deployments import startup

URL = "http://127.0.0.1:8000"


def config(**security: str) -> AppConfig:
    return parse_args({"model": {"path": "some/model"}, "security": security})


def test_the_curl_line_sends_a_key_where_one_is_asked_for() -> None:
    line = "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json'"
    assert f"  {line} -d '" in startup._banner(URL, config(), 1.0, None)
    assert f"  {line} -d '" in startup._banner(URL, config(admin_keys_file="admins"), 1.0, None)
    keyed = startup._banner(URL, config(api_keys_file="etc/keys"), 1.0, None)
    assert f"""  {line} -H "Authorization: Bearer $KEY" -d '""" in keyed
    assert "one whose hash is in etc/keys" in keyed
    assert "one whose hash is in MY_KEYS" in startup._banner(URL, config(api_keys_env="MY_KEYS"), 1.0, None)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", b"nonsense\r\n\r\n"])
def test_an_answer_cut_short_is_none(answer: bytes) -> None:
    def serve() -> None:
        with listener.accept()[0] as peer:
            peer.recv(4096)
            peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert startup._get(f"http://127.0.0.1:{listener.getsockname()[1]}/health") is None
        finally:
            thread.join()


def details(status: str, *messages: str) -> dict[str, object]:
    deployments = {
        f"experts-{index}": {"status": "DEPLOY_FAILED" if text else "HEALTHY", "message": text}
        for index, text in enumerate(messages)
    }
    return {"applications": {"a": {"status": status, "message": "it failed", "deployments": deployments}}}


def test_a_failed_start_is_told_by_the_last_error_of_the_first_failed_deployment() -> None:
    trace = "Traceback:\n  File x\ncluster.errors.ConfigError: experts.host: no such address.\n\nsee logs"
    assert startup.failure(details("DEPLOY_FAILED", "", trace), "a") == (
        "experts-1: cluster.errors.ConfigError: experts.host: no such address."
    )
    assert startup.failure(details("DEPLOY_FAILED"), "a") == "it failed"


def test_a_start_under_way_is_no_failure() -> None:
    assert startup.failure(details("DEPLOYING", "replica is slow"), "a") is None
    assert startup.failure({}, "a") is None


def test_a_failed_start_without_a_reason_is_told_all_the_same() -> None:
    silent = {"applications": {"a": {"status": "DEPLOY_FAILED", "message": "", "deployments": {}}}}
    assert startup.failure(silent, "a") == "see the log"

"""Servers of the benchmark: awaited, stopped with all they started, and told apart from those that end or litter."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra.bench.server import free_port, running

SERVER = """
import http.server, sys, subprocess
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'ok')
{before}
try:
    http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
except KeyboardInterrupt:
    pass
"""
LITTER = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"


@pytest.fixture
def command() -> Callable[[int, str], list[str]]:
    return lambda port, before: [sys.executable, "-c", SERVER.format(before=before), str(port)]


def test_a_server_runs_until_the_block_ends(tmp_path: Path, command: Callable[[int, str], list[str]]) -> None:
    port = free_port()
    with running(command(port, ""), port, tmp_path / "log", {}) as server:
        server.await_health()
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert answer.read() == b"ok"
        assert server.pids() == [server.process.pid]
        process = server.process
    assert not process.is_running()


@pytest.mark.parametrize("allowed", [True, False])
def test_what_it_leaves_behind_is_ended_and_an_error_unless_allowed(
    allowed: bool, tmp_path: Path, command: Callable[[int, str], list[str]]
) -> None:
    port = free_port()
    left: list[psutil.Process] = []

    def run() -> None:
        with running(command(port, LITTER), port, tmp_path / "log", {}, may_leave_processes=allowed) as server:
            server.await_health()
            left.extend(server.process.children(recursive=True))

    if allowed:
        run()
    else:
        with pytest.raises(RuntimeError, match="1 processes of the server outlived it"):
            run()
    (process,) = left
    assert not process.is_running()


def test_one_that_ends_by_itself_is_an_error_with_its_last_words(
    tmp_path: Path, command: Callable[[int, str], list[str]]
) -> None:
    port = free_port()
    with (
        pytest.raises(RuntimeError, match=r"exit status 3(.|\n)*no model here"),
        running(command(port, "print('no model here', flush=True); sys.exit(3)"), port, tmp_path / "log", {}) as server,
    ):
        server.await_health()

"""The terminal view: what it shows of an event, how it reads a server, and how it ends. Two seconds."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster import top, top_feed, top_view

HEAT = {"layers": [3, 4], "experts": 3, "rows_per_s": [[4.0, 0, 0.5], [0, 500, 0]], "group": [[0, 1, 0], [1, 0, 1]]}


def replica(name: str, state: str = "ready", **fields: Any) -> dict[str, Any]:
    return {"id": name, "state": state, "pool": "h100", "utilization": 0.25, "speed_rows_per_s": 1234.5} | fields


def event(**fields: Any) -> dict[str, Any]:
    router = {
        "id": "router-with-a-long-id", "running": 3, "waiting": 1, "kv_used_tokens": 640,
        "tokens_generated": 9000, "preemptions": 2, "ttft_p95_ms": 250.1, "tpot_p95_ms": None,
    }  # fmt: skip
    decision = {"time": 1.7e9, "group": "experts-1", "pool": "h100", "from": 1, "to": 2, "reason": "experts-1: [hot]"}
    replicas = [replica("a"), replica("b", "joining", utilization=None)]
    groups = [
        {"name": "experts-0", "target_replicas": 2, "replicas": replicas},
        {"name": "experts-1", "target_replicas": 1, "replicas": [], "failures": [{"reason": "no memory"}]},
    ]  # fmt: skip
    return {
        "time": 1.7e9,
        "cluster": {"model": "demo", "groups": groups, "routers": [router], "decisions": [decision]},
        "health": {"status": "unavailable", "missing": ["experts-1"], "reasons": {"experts-1": "no memory"}},
        "rates": {
            "tokens_per_s": 87.25, "requests_running": 3, "requests_waiting": 1,
            "ttft_p95_ms": 250.1, "tpot_p95_ms": None,
        },
        "heat": HEAT,
    } | fields  # fmt: skip


def printed(shown: dict[str, Any] | None, trouble: str = "", width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(top_view.picture(shown, trouble, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture_has_groups_routers_hottest_experts_decisions_and_health() -> None:
    text = printed(event())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("demo") and line.endswith("unavailable: experts-1 missing") for line in lines)
    assert "experts-0 2/2 504 a ready 25 % h100 1,234" in lines
    assert "b joining - h100 1,234" in lines
    assert "experts-1 0/1 0 none" in lines
    assert any("no memory" in line for line in lines)
    assert "..-long-id 3 1 640 9,000 2 250 -" in lines
    assert "4 1 0 500" in lines
    assert any(line.endswith("experts-1 1 -> 2 experts-1: [hot]") for line in lines), "a reason is no markup"
    assert "87 tokens/s 3 running 1 waiting first token 250 ms next - ms (p95)" in lines


def test_what_nobody_knows_is_a_dash_and_trouble_stands_above_the_last_event() -> None:
    away = event(
        cluster=None, rates=dict.fromkeys(event()["rates"]), heat=HEAT | {"layers": [], "rows_per_s": [], "group": []}
    )
    assert "- tokens/s" in printed(away)
    text = printed(event(), "http://x does not answer: refused.")
    assert text.startswith("http://x does not answer: refused. Trying again every second.")
    assert "experts-0" in text
    assert "Waiting for the first event." in printed(None)


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = printed(event(), "no server", width)
    assert max(map(len, text.splitlines())) <= width
    assert ("pool" in text.split()) == (width >= top_view.NARROW)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 6))
def test_the_hottest_are_the_greatest_and_in_order(rows: list[list[int]], count: int) -> None:
    heat = {"layers": list(range(len(rows))), "rows_per_s": rows, "group": [[0] * 4 for _ in rows]}
    found = [rate for rate, *_ in top_view.hottest(heat, count)]
    assert found == sorted((rate for layer in rows for rate in layer if rate), reverse=True)[:count]
    assert top_view.group_rates(heat) == {0: sum(map(sum, rows))}


class Server:
    """Answers every request with the next of `answers`: a status, or events after which the stream ends."""

    def __init__(self, *answers: int | list[dict[str, Any]]) -> None:
        left, self.keys = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.keys.append(handler.headers["authorization"])
                answer = left.pop(0)
                handler.send_response(answer if isinstance(answer, int) else 200)
                handler.end_headers()
                if answer == 401:
                    handler.wfile.write(json.dumps({"error": {"message": "There are no admin keys."}}).encode())
                for each in [] if isinstance(answer, int) else answer:
                    handler.wfile.write(f"retry: 1000\n\nid: 1\ndata: {json.dumps(each)}\n\n".encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def run(server_url: str, *arguments: str, **environment: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=120)
    status = top.main(["--url", server_url, *arguments], environment, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_once_prints_the_first_event_that_knows_the_rates_and_sends_the_key() -> None:
    unknown = event(rates=dict.fromkeys(event()["rates"]))
    with Server([unknown, event(), unknown]) as server:
        status, text = run(server.url, "--once", "--key-env", "ADMIN", ADMIN="secret")
    assert (status, server.keys) == (0, ["Bearer secret"])
    assert "87 tokens/s" in text
    with Server([unknown] * 9) as server:
        assert "- tokens/s" in run(server.url, "--once")[1]
    assert server.keys == [None]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (401, "asks for a key: name a variable with an admin key by --key-env NAME. There are no admin keys."),
        (404, "has no /dashboard/events"),
        (503, "answers 503"),
        ([], "ended the stream before its first event"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    answer: int | list[dict[str, Any]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(answer) as server:
        assert run(server.url, "--once") == (1, "")
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_server_that_is_not_there_a_wrong_url_and_a_missing_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as server:
        gone = server.url
    assert run(gone, "--once")[0] == 1
    assert "does not answer" in capsys.readouterr().err
    assert run("ftp://x", "--once")[0] == 1
    assert "use http://HOST:PORT" in capsys.readouterr().err
    assert run(gone, "--key-env", "NOT_SET")[0] == 2
    assert "the variable NOT_SET is not set" in capsys.readouterr().err


def test_it_survives_a_restart_of_the_server_with_the_last_event_in_sight() -> None:
    first, second = event(time=1.0), event(time=2.0)
    pauses: list[float] = []
    with Server([first], 503, [second], 401) as server:
        seen = top.updates(lambda: top_feed.read_events(server.url, None), pauses.append)
        assert next(seen) == (first, "")
        assert next(seen) == (first, "The server has ended the stream.")
        away, trouble = next(seen)
        assert (away, "503" in trouble) == (first, True)
        assert next(seen) == (second, "")
        next(seen)
        with pytest.raises(top_feed.FeedError, match="key"):
            next(seen)
    assert pauses == [top.RETRY_S] * 3


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> Iterator[top_feed.Event]:
        yield event()
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "read_events", interrupted)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    assert top.main([], {}, console) == 0
    assert isinstance(console.file, io.StringIO)
    assert "tokens/s" in console.file.getvalue()
    assert capsys.readouterr().err == ""

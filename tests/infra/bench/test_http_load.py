"""The load generator: what it makes of an answer's bytes and their times, and that it refuses all but whole answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from infra.bench.http_load import Endpoint, LoadError, parse

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


def event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def text(shown: str) -> bytes:
    return event({"choices": [{"text": shown}]})


def chunk(*events: bytes) -> bytes:
    data = b"".join(events)
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


END = chunk(event(USAGE), b"data: [DONE]\n\n") + b"0\r\n\r\n"


def test_times_are_those_of_reads_with_events_and_not_of_the_headers() -> None:
    arrivals = [(10.5, HEAD), (11.0, chunk(text("a"))), (11.25, chunk(text("b"), text("c"))), (12.0, END)]
    stream = parse(arrivals, started_at=10.0)
    assert (stream.first_s, stream.gaps_s) == (1.0, (0.25, 0.75))
    assert (stream.tokens, stream.events, stream.reads) == (3, 3, 4)


def test_headers_and_events_in_one_read_count_as_an_arrival() -> None:
    assert parse([(1.0, HEAD + chunk(text("abc")) + END)], started_at=0.5).first_s == 0.5


def test_chunks_may_be_cut_anywhere() -> None:
    raw = HEAD + chunk(text("a")) + chunk(text("b")) + END
    stream = parse([(1.0, raw[:60]), (2.0, raw[60:75]), (3.0, raw[75:])], started_at=0.0)
    assert (stream.tokens, stream.events) == (3, 2)


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with pytest.raises(LoadError, match="broke off"):
        parse([(1.0, HEAD + chunk(text("a")))], started_at=0.0)


def test_an_error_in_place_of_an_end_is_an_error() -> None:
    with pytest.raises(LoadError, match="no replica"):
        parse([(1.0, HEAD + chunk(text("a"), event({"error": "no replica"})) + b"0\r\n\r\n")], started_at=0.0)


def test_another_status_is_an_error_with_the_servers_words() -> None:
    with pytest.raises(LoadError, match="queue is full"):
        parse([(1.0, b"HTTP/1.1 429 Too Many Requests\r\n\r\nqueue is full")], started_at=0.0)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A server that answers three tokens in two events to whoever asks."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(chunk(text(asked["prompt"])) + chunk(text("b")) + END)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1/completions", "m", {}, list)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_prompt_is_a_client(endpoint: Endpoint) -> None:
    load = endpoint.complete(["x", "y", "z"], new_tokens=3, timeout_s=10)
    assert load.tokens == 9
    assert load.tokens_per_event == 1.5
    assert load.wall_s >= max(stream.first_s for stream in load.streams) > 0


def test_fewer_tokens_than_asked_for_are_an_error(endpoint: Endpoint) -> None:
    with pytest.raises(LoadError, match="3 tokens in place of 4"):
        endpoint.complete(["x"], new_tokens=4, timeout_s=10)

"""A load generator: many streaming clients at once over raw connections, and what each of them saw, and when.

Clients run in this process, beside the server on the same cores; so while an answer arrives they only keep bytes and
times, and everything is parsed after the last one has ended. Knows HTTP/1.1 and server-sent events, no model.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from infra.bench.measure import percentile

READ_BYTES = 1 << 16
_EVENT_END = b"\n\n"
_DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's completions.

    url: of `/v1/completions`. model: its name there. fields: of every request, beside prompt and length.
    pids: asks for all processes of the server.
    """

    url: str
    model: str
    fields: Mapping[str, Any]
    pids: Callable[[], list[int]]

    def complete(self, prompts: Sequence[str | Sequence[int]], new_tokens: int, timeout_s: float = 120.0) -> Load:
        """One client a prompt, all at once, greedy and streaming; see `run_load`."""
        common = {"model": self.model, "max_tokens": new_tokens, "temperature": 0.0, "stream": True, **self.fields}
        bodies = [{**common, "prompt": prompt} for prompt in prompts]
        return run_load(self.url, bodies, new_tokens=new_tokens, timeout_s=timeout_s)


class LoadError(Exception):
    """A client was not served as it asked; the message holds what the server said."""


@dataclass(frozen=True)
class Stream:
    """One client's answer. Times in seconds since all clients started.

    first_s: arrival of the first event. gaps_s: between consecutive arrivals.
    tokens: completion tokens by the server's own usage. events: those that carried output. reads: arrivals of data.
    """

    first_s: float
    gaps_s: tuple[float, ...]
    tokens: int
    events: int
    reads: int


@dataclass(frozen=True)
class Load:
    """What all clients saw. wall_s: from the start to the last end."""

    streams: tuple[Stream, ...]
    wall_s: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def tokens_per_s(self) -> float:
        """Over the whole run, prompts included."""
        return self.tokens / self.wall_s

    @property
    def tokens_per_event(self) -> float:
        """The coalescing factor."""
        return self.tokens / sum(stream.events for stream in self.streams)

    @property
    def events_per_read(self) -> float:
        """How many events come at once."""
        return sum(stream.events for stream in self.streams) / sum(stream.reads for stream in self.streams)

    def gap_s(self, share: float) -> float:
        """The percentile `share` (0 to 1) of the times between two arrivals of one stream."""
        return percentile((gap_s for stream in self.streams for gap_s in stream.gaps_s), share)


def run_load(url: str, bodies: Sequence[Mapping[str, Any]], *, new_tokens: int, timeout_s: float) -> Load:
    """Post every body to `url` at once, each on a connection of its own, and read all answers to their end.

    Raises:
        LoadError: an answer was not 200, broke off, or had not exactly `new_tokens` tokens.
        TimeoutError: it took longer than `timeout_s`.
    """
    load = asyncio.run(_all(url, bodies, timeout_s))
    for stream in load.streams:
        if stream.tokens != new_tokens:
            raise LoadError(f"an answer had {stream.tokens} tokens in place of {new_tokens}")
    return load


async def _all(url: str, bodies: Sequence[Mapping[str, Any]], timeout_s: float) -> Load:
    requests = [_request(url, body) for body in bodies]
    started_at = time.perf_counter()
    async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
        tasks = [group.create_task(_answer(url, request)) for request in requests]
    wall_s = time.perf_counter() - started_at
    return Load(tuple(parse(task.result(), started_at) for task in tasks), wall_s)


def _request(url: str, body: Mapping[str, Any]) -> bytes:
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _answer(url: str, request: bytes) -> list[tuple[float, bytes]]:
    """(time, bytes) of every read until the server closes the connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    arrivals = []
    try:
        writer.write(request)
        while data := await reader.read(READ_BYTES):
            arrivals.append((time.perf_counter(), data))
    finally:
        writer.close()
    return arrivals


def parse(arrivals: Sequence[tuple[float, bytes]], started_at: float) -> Stream:
    """What one client saw, from the raw bytes of its HTTP/1.1 answer.

    Raises:
        LoadError: the status is not 200, or the answer has an error in place of an end.
    """
    raw = b"".join(data for _, data in arrivals)
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0] + b" ":
        raise LoadError(raw[:2000].decode(errors="replace"))
    body = _unchunked(rest) if b"transfer-encoding: chunked" in head.lower() else rest
    usage, shown = None, 0
    for event in body.split(_EVENT_END):
        if not event.startswith(b"data: ") or event == _DONE:
            continue
        content = json.loads(event.removeprefix(b"data: "))
        if "error" in content:
            raise LoadError(event.decode())
        usage = content.get("usage") or usage
        # An event that only tells usage, as the last one does, is no output.
        shown += any(choice.get("text") or choice.get("finish_reason") for choice in content["choices"])
    if usage is None:
        raise LoadError(f"an answer ended without usage: {raw[-500:].decode(errors='replace')}")
    times = _arrival_times(arrivals, len(head))
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    tokens = int(usage["completion_tokens"])
    return Stream(times[0] - started_at, gaps, tokens, shown, len(arrivals))


def _arrival_times(arrivals: Sequence[tuple[float, bytes]], head_bytes: int) -> list[float]:
    """When events arrived: the reads that hold the start of one, those with only headers left out."""
    times, position = [], 0
    for at, data in arrivals:
        if b"data: " in data[max(0, head_bytes - position) :]:
            times.append(at)
        position += len(data)
    return times


def _unchunked(rest: bytes) -> bytes:
    """The body in chunked transfer coding.

    Raises:
        LoadError: it breaks off before its last chunk.
    """
    body, position = bytearray(), 0
    while True:
        line_end = rest.find(b"\r\n", position)
        if line_end < 0:
            raise LoadError(f"an answer broke off: {rest[-500:].decode(errors='replace')}")
        size = int(rest[position:line_end].split(b";")[0], 16)
        if size == 0:
            return bytes(body)
        body += rest[line_end + 2 : line_end + 2 + size]
        position = line_end + 2 + size + 2

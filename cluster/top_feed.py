"""The live picture of a server, read from its `/dashboard/events`: one mapping a second, for who shows it.

Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html. Knows no terminal.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 5.0
"""An event comes every second: a server that is silent for longer hangs, or is gone."""

Event = dict[str, Any]


class FeedError(Exception):
    """The server cannot be read now; one sentence says why. final: trying again does not help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def read_events(url: str, key: str | None, timeout_s: float = TIMEOUT_S) -> Iterator[Event]:
    """Events of the server at `url`, as they come, until its stream ends.

    Raises:
        FeedError: there is no such server, it refuses, or its stream breaks.
    """
    base = urlsplit(url)
    if base.scheme not in ("http", "https") or not base.netloc:
        raise FeedError(f"--url: {url!r} is no address of a server; use http://HOST:PORT.", final=True)
    request = urllib.request.Request(f"{url.rstrip('/')}/dashboard/events")
    if key:
        # For this server only: not for one that it names in a redirect, nor for a proxy of the environment.
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            yield from parse(answer)
    except urllib.error.HTTPError as error:
        raise _refused(url, error, key) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise FeedError(f"{url} does not answer: {reason or type(error).__name__}.") from None


def parse(lines: Iterable[bytes]) -> Iterator[Event]:
    """The JSON objects of a stream of server-sent events, each with its data in one line. Raises ValueError."""
    for line in lines:
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if not isinstance(event, dict):
                raise ValueError("an event that is no object")
            yield event


def _refused(url: str, error: urllib.error.HTTPError, key: str | None) -> FeedError:
    with error:
        if error.code == 401:
            wrong = "refuses this key" if key else "asks for a key"
            what = f"{url} {wrong}: name a variable with an admin key by --key-env NAME. {_sentence(error)}"
            return FeedError(what.rstrip(), final=True)
        if error.code == 404:
            return FeedError(f"{url} has no /dashboard/events: is it an ExpertScale server?", final=True)
        return FeedError(f"{url} answers {error.code} {error.reason}.")


def _sentence(error: urllib.error.HTTPError) -> str:
    """What the server says about its refusal; "" where that is no error object."""
    try:
        return str(json.loads(error.read(65536))["error"]["message"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return ""

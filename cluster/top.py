"""`python -m cluster.top`: a running server at a glance, in a terminal, once a second.

Exit status: 0 after Ctrl-C or `--once`, 1 where the server cannot be read, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.live import Live

from cluster.top_feed import Event, FeedError, read_events
from cluster.top_view import picture

URL = "http://127.0.0.1:8000"
RETRY_S = 1.0
PATIENT_EVENTS = 3
"""With `--once`: so many events are waited for until one knows the rates, which are differences."""

Read = Callable[[], Iterator[Event]]


def updates(read: Read, sleep: Callable[[float], None] = time.sleep) -> Iterator[tuple[Event | None, str]]:
    """(the newest event, trouble) for ever; the last event stays in sight while the server is away.

    Raises:
        FeedError: what trying again does not help.
    """
    event: Event | None = None
    while True:
        trouble = "The server has ended the stream."
        try:
            for event in read():
                yield event, ""
        except FeedError as error:
            if error.final:
                raise
            trouble = str(error)
        yield event, trouble
        sleep(RETRY_S)


def once(read: Read) -> Event:
    """The first event that knows the rates, or the last of the few that are waited for. Raises FeedError."""
    event: Event | None = None
    for seen, event in enumerate(read(), start=1):
        if event["rates"]["tokens_per_s"] is not None or seen == PATIENT_EVENTS:
            break
    if event is None:
        raise FeedError("The server has ended the stream before its first event.")
    return event


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ, console: Console | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options(arguments)
    console = console or Console()
    if options.key_env is not None and not environment.get(options.key_env):
        print(f"--key-env: the variable {options.key_env} is not set.", file=sys.stderr)
        return 2
    key = environment[options.key_env] if options.key_env else None
    read = partial(read_events, options.url, key)
    try:
        if options.once or not console.is_terminal:
            console.print(picture(once(read), width=console.width))
        else:
            _follow(read, console)
    except FeedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _follow(read: Read, console: Console) -> None:
    with Live(picture(None), console=console, screen=True, auto_refresh=False) as live:
        for event, trouble in updates(read):
            live.update(picture(event, trouble, console.width), refresh=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.top", description="A running server at a glance.")
    parser.add_argument("--url", default=URL, help=f"of the server (default: {URL})")
    parser.add_argument("--key-env", metavar="NAME", help="the variable that holds an admin key")
    parser.add_argument("--once", action="store_true", help="print once and exit")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

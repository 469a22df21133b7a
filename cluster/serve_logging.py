"""Lets our log lines appear where Serve's do: in the terminal, the dashboard and the replica's log file.

There they have Serve's form. With `logging_config: {encoding: JSON}` a line of a log file is one object, and what was
given as `extra` is in it; the terminal stays as people read it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

PACKAGES = ("cluster", "deployments", "autoscale")


def log_through_serve(*, access: bool = True) -> None:
    """Call first thing in a replica, and in the controller. Without it lines below WARNING are lost.

    Nobody listens to our loggers there.

    Serve gives the logger `ray.serve` its handlers and level in every replica; ours become its children.
    access: whether Serve's line for each call is wanted. Its own option for that would be a `logging_config` of the
    deployment, which hides the application's and with it the encoding.
    """
    serve = logging.getLogger("ray.serve")
    for name in PACKAGES:
        ours = logging.getLogger(name)
        ours.parent = serve
        ours.setLevel(logging.NOTSET)
    if not access:
        serve.addFilter(_is_no_access)


def about(*request_ids: str) -> dict[str, object]:
    """The `extra` of a line about these HTTP requests. Text shows one alone, see `several`; in JSON all are, as keys.

    Serve itself names the request where a line comes from the task that handles it, but not in other threads.

    >>> about("a"), about("a", "b", "a"), about("")
    ({'request_id': 'a'}, {'request_ids': ['a', 'b']}, {})
    """
    known = _known(request_ids)
    return {"request_ids": known} if len(known) > 1 else {"request_id": known[0]} if known else {}


def several(*request_ids: str) -> str:
    """What belongs into the message of such a line, for whoever reads or searches text.

    >>> several("a", "b", "a"), several("a")
    (' (x-request-id a, b)', '')
    """
    known = _known(request_ids)
    return f" (x-request-id {', '.join(known)})" if len(known) > 1 else ""


def _known(request_ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, request_ids)))


def _is_no_access(record: logging.LogRecord) -> bool:
    return not getattr(record, "serve_access_log", False)

"""Lets our log lines appear where Serve's do: in the terminal, the dashboard and the replica's log file."""

from __future__ import annotations

import logging

PACKAGES = ("cluster", "deployments", "autoscale")


def log_through_serve() -> None:
    """Call first thing in a replica, and in the controller. Without it lines below WARNING are lost.

    Nobody listens to our loggers there.

    Serve gives the logger `ray.serve` its handlers and level in every replica; ours become its children.
    """
    serve = logging.getLogger("ray.serve")
    for name in PACKAGES:
        ours = logging.getLogger(name)
        ours.parent = serve
        ours.setLevel(logging.NOTSET)

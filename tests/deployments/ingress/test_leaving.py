"""Whether this replica is to stop, read off the controller's details; who cannot be asked says no."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from ray.serve._private.common import ReplicaState

from deployments.ingress.leaving import Leaving


@pytest.mark.parametrize(
    ("state", "mine", "leaving"),
    [
        (ReplicaState.STOPPING, "me", True),
        ("STOPPING", "me", True),
        (ReplicaState.RUNNING, "me", False),
        (ReplicaState.STOPPING, "other", False),
    ],
)
def test_a_replica_leaves_when_serve_is_stopping_it(state: Any, mine: str, leaving: bool) -> None:
    async def details() -> Mapping[str, Any]:
        replicas = [{"replica_id": mine, "state": state}]
        return {"applications": {"app": {"deployments": {"Ingress": {"replicas": replicas}}}}}

    assert asyncio.run(Leaving("app", "Ingress", "me", details)()) is leaving


def test_who_cannot_be_asked_or_knows_nothing_says_no() -> None:
    async def broken() -> Mapping[str, Any]:
        raise RuntimeError("no controller")

    async def empty() -> Mapping[str, Any]:
        return {"applications": {}}

    assert asyncio.run(Leaving("app", "Ingress", "me", broken)()) is False
    assert asyncio.run(Leaving("app", "Ingress", "me", empty)()) is False

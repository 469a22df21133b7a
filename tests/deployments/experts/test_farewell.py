"""When an expert replica that was told to stop may go. Time is a list with one number; milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.membership import Address, Replica, State
from deployments.experts.farewell import ASK_EVERY_S, until_spared

REPLICA = Replica("a", "experts-0", "default", Address("n", "", "", 0), "ab" * 32, 1.0, State.DRAINING)


def leave(answers: Sequence[bool | None], connections: Sequence[int] = (0,), timeout_s: float = 600) -> Any:
    """(spared, seconds waited). answers: of the Directory, None where it is down; the last ones are for ever."""
    clock, asked = [0.0], [0]

    async def needed(replica: Replica) -> bool:
        assert replica is REPLICA
        answer = answers[min(asked[0], len(answers) - 1)]
        asked[0] += 1
        if answer is None:
            raise ConnectionError("the directory is down")
        return answer

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    directory = SimpleNamespace(needed=SimpleNamespace(remote=needed))
    spared = asyncio.run(
        until_spared(
            directory,
            REPLICA,
            lambda: connections[min(asked[0], len(connections)) - 1],
            timeout_s,
            clock=lambda: clock[0],
            sleep=sleep,
        )
    )
    return spared, clock[0]


def test_a_replica_nobody_needs_goes_at_once() -> None:
    assert leave([False]) == (True, 0)
    assert leave([False], connections=[3]) == (True, 0)


def test_a_replica_that_is_needed_stays_until_it_is_not() -> None:
    assert leave([True, True, True, False]) == (True, pytest.approx(3 * ASK_EVERY_S))


def test_while_the_directory_is_down_its_connections_decide() -> None:
    assert leave([None]) == (True, 0)
    assert leave([None], connections=[2, 1, 0]) == (True, pytest.approx(2 * ASK_EVERY_S))
    assert leave([None, True, None], connections=[2, 2, 0]) == (True, pytest.approx(2 * ASK_EVERY_S))


def test_nobody_is_waited_for_longer_than_the_longest_request() -> None:
    spared, waited_s = leave([True], timeout_s=5)
    assert not spared
    assert 5 <= waited_s <= 5 + ASK_EVERY_S

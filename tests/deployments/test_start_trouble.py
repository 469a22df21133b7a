"""What people are told of a replica that cannot start. Milliseconds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError, ReplicaStartError
from cluster.stats import REASON_CHARS, StartFailure
from deployments.start_trouble import explanation, telling


class Hearing:
    """A Directory that hears of failures, or is down."""

    def __init__(self, *, down: bool = False) -> None:
        self.heard: list[StartFailure] = []
        self.report_failure = SimpleNamespace(remote=self._hear)
        self._down = down

    async def _hear(self, failure: StartFailure) -> None:
        if self._down:
            raise ConnectionError("the directory is down")
        self.heard.append(failure)


def fail(directory: Hearing, error: Exception) -> str:
    """What the caller of a constructor that raises `error` is told."""

    async def story() -> None:
        async with telling(directory, part="experts-2", deployment="experts-2-h100", digest="ab"):
            raise error

    with pytest.raises(ReplicaStartError) as caught:
        asyncio.run(story())
    return str(caught.value)


@pytest.mark.parametrize("down", [False, True])
def test_the_reason_is_told_and_raised_whether_or_not_anybody_hears_it(down: bool) -> None:
    directory = Hearing(down=down)
    told = fail(directory, CheckpointError("the shard /models/m-2.safetensors is missing; ..."))
    assert told == "experts-2-h100 cannot start: the shard /models/m-2.safetensors is missing; ..."
    if not down:
        [heard] = directory.heard
        assert (heard.part, heard.deployment, heard.digest) == ("experts-2", "experts-2-h100", "ab")
        assert heard.reason == told


def test_nothing_is_told_where_nothing_breaks() -> None:
    directory = Hearing()

    async def story() -> None:
        async with telling(directory, part="router", deployment="Router", digest="ab"):
            pass

    asyncio.run(story())
    assert not directory.heard


def out_of_memory() -> Exception:
    """torch's own, for an allocation no machine can make."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("the allocation succeeded")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        out_of_memory(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_called_that_whoever_notices_it(error: Exception) -> None:
    assert explanation(error, "experts-2").startswith("experts-2 cannot start: there is not enough memory")


@pytest.mark.parametrize("error", [ValueError("a\n  b\nc"), KeyError(), RuntimeError("x" * 9999), Exception("\n\n")])
def test_any_error_becomes_one_short_line(error: Any) -> None:
    told = explanation(error, "Router")
    assert told.startswith(f"Router cannot start: {type(error).__name__}: ")
    assert "\n" not in told
    assert len(told) <= REASON_CHARS

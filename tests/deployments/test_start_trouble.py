"""What people are told of a replica that cannot start. Milliseconds."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError, ReplicaStartError
from cluster.stats import REASON_CHARS, StartFailure
from deployments.loading import Loading
from deployments.start_trouble import explanation, telling


class Hearing:
    """A Directory that hears of failures, or is down."""

    def __init__(self, *, down: bool = False) -> None:
        self.heard: list[StartFailure] = []
        self.words: list[Loading] = []
        self.report_failure = SimpleNamespace(remote=self._hear)
        self.report_loading = SimpleNamespace(remote=self._hear_word)
        self._down = down

    async def _hear(self, failure: StartFailure) -> None:
        if self._down:
            raise ConnectionError("the directory is down")
        self.heard.append(failure)

    async def _hear_word(self, word: Loading) -> None:
        if self._down:
            raise ConnectionError("the directory is down")
        self.words.append(word)


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
        assert directory.words[-1].over, "it would seem to have vanished, too"


def test_no_failure_is_told_where_nothing_breaks_but_that_it_loads_and_that_this_is_over() -> None:
    directory = Hearing()

    async def story() -> None:
        async with telling(directory, part="router", deployment="Router", digest="ab"):
            while not directory.words:
                await asyncio.sleep(0)
        while len(directory.words) < 2:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(story(), 10))
    assert not directory.heard
    first, last = directory.words
    assert (first.over, last.over) == (False, True)
    assert (first.start, first.n < last.n) == (last.start, True)
    assert (first.part, first.deployment, first.digest, first.pid) == ("router", "Router", "ab", os.getpid())
    assert 0 < first.resident_bytes < first.available_bytes + first.resident_bytes


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

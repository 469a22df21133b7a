"""A replica that vanishes while it loads leaves a reason. A real process is killed; time is a number."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import ExpertsSpec
from cluster.membership import Address, Replica, State
from cluster.placement import contiguous
from cluster.snapshot import cluster_facts
from cluster.stats import REASON_CHARS, ReplicaStats, StartFailure
from deployments.directory_core import DirectoryCore
from deployments.loading import FORGET_S, SILENCE_S, Loading, silence

FACTS = cluster_facts("demo", "ab", contiguous({0: 4}, 2), ExpertsSpec(groups=2))
WORD = Loading("start", 1, 5.0, "experts-0", "experts-0", "ab", "host", 7, 3 << 20, 2048 << 20)

# Says its words to a Directory that is a pipe, and loads until it is told to end, or killed.
LOADER = """
import asyncio, pickle, sys
from types import SimpleNamespace
from deployments.start_trouble import telling

async def write(*said):
    sys.stdout.buffer.write(pickle.dumps(said))
    sys.stdout.buffer.flush()

async def main():
    words = {name: SimpleNamespace(remote=lambda *said, name=name: write(name, *said))
             for name in ("report_loading", "report_failure")}
    async with telling(SimpleNamespace(**words), part="experts-0", deployment="experts-0-gpu", digest="ab"):
        if await asyncio.to_thread(sys.stdin.readline) == "fail\\n":
            raise ValueError("no such shard")
    await asyncio.sleep(0)
    await asyncio.sleep(0)

asyncio.run(main())
"""


class Story:
    """A Directory, its time, and processes that report to it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.core = DirectoryCore(FACTS, incarnation="a", clock=lambda: self.now)

    def say(self, word: Loading) -> None:
        asyncio.run(self.core.report_loading(word))

    def reasons_after(self, seconds: float) -> dict[str, str]:
        self.now += seconds
        asyncio.run(self.core.expire())
        return self.core.reasons()

    def load(self, end: Callable[[subprocess.Popen[bytes]], Any]) -> int:
        """Run a process that loads and says so, end it, and hear all it has said; returns its id."""
        command = [sys.executable, "-c", LOADER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd()) as process:
            assert process.stdout is not None
            self._hear(pickle.load(process.stdout))
            end(process)
            try:
                while True:
                    self._hear(pickle.load(process.stdout))
            except EOFError:
                return process.pid

    def _hear(self, said: tuple[Any, ...]) -> None:
        name, word = said
        asyncio.run(getattr(self.core, name)(word))


@pytest.fixture
def story() -> Story:
    return Story()


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def told(text: bytes) -> Callable[[subprocess.Popen[bytes]], Any]:
    def tell(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()

    return tell


def test_a_process_killed_while_it_loads_leaves_a_reason(story: Story) -> None:
    pid = story.load(kill)
    assert story.reasons_after(SILENCE_S / 2) == {}, "it may still speak"
    reasons = story.reasons_after(SILENCE_S)
    assert reasons.keys() == {"experts-0"}
    reason = reasons["experts-0"]
    assert reason.startswith(f"experts-0-gpu cannot start: process {pid} on ")
    assert " fell silent while it loaded, without an error (killed?)" in reason
    assert "held 0 MiB" not in reason
    assert [each["deployment"] for each in story.core.snapshot({})["groups"][0]["failures"]] == ["experts-0-gpu"]


def test_one_that_ends_by_itself_has_not_vanished(story: Story) -> None:
    story.load(told(b"ok\n"))
    assert story.reasons_after(SILENCE_S * 2) == {}


def test_one_that_fails_says_its_own_reason_and_no_other(story: Story) -> None:
    story.load(told(b"fail\n"))
    for _ in range(2):
        assert story.reasons_after(SILENCE_S * 2) == {
            "experts-0": "experts-0-gpu cannot start: ValueError: no such shard"
        }


def test_one_that_was_only_silent_is_believed_when_it_speaks_again(story: Story) -> None:
    story.say(WORD)
    assert story.reasons_after(SILENCE_S + 1)
    story.say(replace(WORD, n=2))
    assert story.reasons_after(0) == {}
    assert story.reasons_after(SILENCE_S + 1), "and missed again"


def test_a_start_that_vanished_is_counted_once_it_cannot_be_disproved_any_more(story: Story) -> None:
    story.say(WORD)
    assert story.reasons_after(SILENCE_S + 1)
    story.say(replace(WORD, n=2))
    assert story.reasons_after(SILENCE_S + 1)
    assert not story.core.standing().failed_starts
    story.reasons_after(FORGET_S)
    assert story.core.standing().failed_starts == {"experts-0": 1}


def test_a_word_that_was_overtaken_says_nothing(story: Story) -> None:
    story.say(replace(WORD, n=3, over=True))
    story.say(replace(WORD, n=2))
    assert story.reasons_after(SILENCE_S + 1) == {}


def test_a_reason_goes_with_the_next_start_that_succeeds_and_is_not_kept_for_ever(story: Story) -> None:
    story.say(WORD)
    assert story.reasons_after(SILENCE_S + 1)
    address = Address("node", "/s", "", 0)
    ready = Replica("experts-0#new", "experts-0", "default", address, "ab", 1.0, State.READY)
    asyncio.run(story.core.report(ready, ReplicaStats()))
    assert story.reasons_after(0) == {}

    story.say(replace(WORD, start="other"))
    assert story.reasons_after(SILENCE_S + 1)
    assert story.reasons_after(FORGET_S) == {}


def test_other_reasons_stay_when_one_is_taken_back(story: Story) -> None:
    story.say(WORD)
    asyncio.run(story.core.report_failure(StartFailure(1.0, "experts-0", "experts-0", "no disk", "ab")))
    assert story.reasons_after(SILENCE_S + 1)["experts-0"] == silence(WORD)
    story.say(replace(WORD, n=2, over=True))
    assert story.reasons_after(0) == {"experts-0": "no disk"}


def test_the_sentence_holds_what_is_known_and_is_short() -> None:
    assert silence(WORD) == (
        "experts-0 cannot start: process 7 on host fell silent while it loaded, without an error (killed?); "
        "at its last word it held 3 MiB, and its machine had 2,048 MiB of memory left."
    )
    assert len(silence(replace(WORD, deployment="d" * 63, host="h" * 999, pid=1 << 22))) <= REASON_CHARS

"""Objects in processes of their own, whose methods are called through a pipe. Knows nothing of what they are.

Such a process ends when its pipe does, so none outlives the benchmark, however that ends.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

ANSWER_S = 120.0
STOP_S = 10.0


class Held(Protocol):
    """What a process holds: its other methods are called by name."""

    def close(self) -> None:
        """Called in the process before it ends."""


class Remote:
    """A process that holds what `make` returns; like every call it answers, once, when that is made.

    preload: fork the process from one that has imported these modules, instead of starting it from nothing. They must
        start no threads when imported. What the first call of a program names holds for all.
    """

    def __init__(self, make: Callable[[], Held], preload: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("forkserver") if preload else multiprocessing.get_context("spawn")
        if preload:
            context.set_forkserver_preload(list(preload))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method without waiting for its `answer`."""
        self._pipe.send((method, arguments))

    def answer(self, timeout_s: float = ANSWER_S) -> Any:
        """What the earliest call without an answer returned.

        Raises:
            RuntimeError: the call failed; the message is its traceback. TimeoutError. EOFError: the process is gone.
        """
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"a process of the benchmark did not answer within {timeout_s:g} s")
        answer, failure = self._pipe.recv()
        if failure is not None:
            raise RuntimeError(failure)
        return answer

    def hang_up(self) -> None:
        """Let the process end by itself."""
        self._pipe.close()

    def join(self) -> None:
        """Wait for the end after `hang_up`, and insist on it."""
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def together(processes: Sequence[Remote], method: str, *arguments: Any) -> list[Any]:
    """The answers of all processes, asked at once."""
    for process in processes:
        process.ask(method, *arguments)
    return [process.answer() for process in processes]


def _work(pipe: Connection, make: Callable[[], Held]) -> None:
    try:
        held = make()
    except Exception:
        pipe.send((None, traceback.format_exc()))
        return
    pipe.send((None, None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((getattr(held, method)(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    held.close()

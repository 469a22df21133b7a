"""Clients that ask for completions of one domain's prompts again and again, and check every answer."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.e2e.conftest import MODEL
from tests.serving import Server

MAX_TOKENS = 48
ANSWER_S = 120.0

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "python": (
        "import os\nimport sys\n\n\ndef read(self, path):\n",
        "class Queue:\n    def __init__(self, maxsize=0):\n",
        "def parse_args(argv):\n    parser = argparse.ArgumentParser()\n",
        "    try:\n        return self._cache[key]\n    except KeyError:\n",
        "for name, value in sorted(items):\n    if value is None:\n",
        "def test_encode(self):\n    self.assertEqual(encode(b'abc'),",
    ),
    "chinese": (
        "该函数返回一个指向字符串的指针，如果出错则",
        "选项 -a 显示所有文件，包括以点开头的",
        "这个命令用于显示系统中的进程，默认情况下",
        "如果文件不存在，程序会返回错误，否则",
        "本手册页描述了如何配置网络接口，以及",
        "参数 size 指定缓冲区的大小，单位是字节",
    ),
}


class Load:
    """Clients at work on `server`. `wanted`: prompt -> the text that every answer must be.

    Failures (an error, or another text) are collected, not raised: `failures` is what a test asserts to be empty.
    """

    def __init__(self, server: Server, wanted: Mapping[str, str]) -> None:
        self._server = server
        self._wanted = wanted
        self.failures: list[str] = []
        self.answers = 0
        self._done: deque[tuple[float, int]] = deque(maxlen=100_000)

    @contextmanager
    def clients(self, domain: str, count: int) -> Iterator[None]:
        """`count` clients that ask until the block ends; then the last answers are awaited."""
        stop = threading.Event()
        prompts = PROMPTS[domain]
        threads = [
            threading.Thread(target=self._ask_on, args=(itertools.cycle(prompts[i % 6 :] + prompts[: i % 6]), stop))
            for i in range(count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(ANSWER_S)

    def tokens_between(self, start: float, stop: float) -> int:
        """Tokens of answers that were finished in that time (monotonic seconds)."""
        return sum(tokens for at, tokens in list(self._done) if start <= at < stop)

    def _ask_on(self, prompts: Iterator[str], stop: threading.Event) -> None:
        while not stop.is_set():
            prompt = next(prompts)
            try:
                text, tokens = self._ask(prompt)
            except Exception as error:
                self.failures.append(f"{prompt!r}: {error!r}")
                stop.wait(0.5)
                continue
            self.answers += 1
            self._done.append((time.monotonic(), tokens))
            if text != self._wanted[prompt]:
                self.failures.append(f"{prompt!r}: {text!r} instead of {self._wanted[prompt]!r}")

    def _ask(self, prompt: str) -> tuple[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=ANSWER_S)
        try:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.load(response)
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer}")
            return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
        finally:
            connection.close()


def references(complete: Callable[[str, int], str]) -> dict[str, str]:
    """What every prompt must be answered with, by the whole model."""
    return {prompt: complete(prompt, MAX_TOKENS) for prompts in PROMPTS.values() for prompt in prompts}

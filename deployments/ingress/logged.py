"""What became of one request that generates, as one line of the log. Never a prompt, a text or a token.

    chat completions ok: stop, 12 tokens in (8 known), 48 out, first after 0.083 s, all after 0.412 s, chatcmpl-...

The same is in the line's `extra`, which a JSON log shows as keys. The words for an outcome are those of the metrics.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from cluster.serve_logging import about
from deployments.ingress.choices import Delta
from deployments.ingress.deadlines import Deadline
from deployments.ingress.errors import ClientGoneError
from deployments.ingress.generate import Generation
from deployments.ingress.metering import CLIENT_GONE, ERROR, OK

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    """How a line names its request. endpoint: as in the metrics. id: of the completion. request_id: `x-request-id`."""

    endpoint: str
    id: str
    request_id: str
    stream: bool


class LoggedGeneration(Generation):
    """A `Generation` that leaves a line when it is closed. Times count from when the request arrived."""

    def __init__(self, *args: Any, label: Label, deadline: Deadline, **others: Any) -> None:
        super().__init__(*args, deadline=deadline, **others)
        self._label = label
        self._started_s = deadline.started_s
        self._first_s: float | None = None
        # Until it has ended in another way: a client that leaves is not always told of.
        self._outcome = CLIENT_GONE
        self._error = ""
        self._told = False

    async def next(self) -> Delta | None:
        """As of `Generation`."""
        try:
            delta = await super().next()
        except ClientGoneError:
            raise
        except Exception as error:
            # The class only: a message may quote what the client sent.
            self._outcome, self._error = ERROR, type(error).__name__
            raise
        if delta is None:
            self._outcome = OK
        else:
            self._outcome, self._error = CLIENT_GONE, ""  # an answer that begins anew has got over its error
            self._first_s = self._first_s or self._since_s()
        return delta

    async def aclose(self) -> None:
        """As of `Generation`; the first time it leaves the line."""
        try:
            await super().aclose()
        finally:
            if not self._told:
                self._told = True
                self._tell()

    def _since_s(self) -> float:
        return asyncio.get_running_loop().time() - self._started_s

    def _tell(self) -> None:
        label, usage, seconds = self._label, self.usage(), self._since_s()
        reasons = [choice.finish_reason for choice in self.choices]
        ended = self._error or ", ".join(sorted({reason or "unfinished" for reason in reasons}))
        first = "none" if self._first_s is None else f"first after {self._first_s:.3f} s"
        logger.info(
            "%s %s: %s, %d tokens in (%d known), %d out, %s, all after %.3f s, %s",
            label.endpoint.removeprefix("/v1/").replace("/", " "), self._outcome, ended,
            usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, first, seconds, label.id,
            extra={
                **about(label.request_id),
                "endpoint": label.endpoint,
                "completion_id": label.id,
                "stream": label.stream,
                "outcome": self._outcome,
                "error": self._error or None,
                "finish_reasons": reasons,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "first_token_s": None if self._first_s is None else round(self._first_s, 4),
                "seconds": round(seconds, 4),
            },
        )  # fmt: skip

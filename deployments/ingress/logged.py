"""What became of one request that generates, as one line of the log. Never a prompt, a text or a token.

    chat completions ok: stop, 12 tokens in (8 known), 48 out, first after 0.083 s, all after 0.412 s, chatcmpl-...

The same is in the line's `extra`, which a JSON log shows as keys. The words for an outcome and
an error are those of the metrics.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

from cluster.errors import error_code
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
        self._error: BaseException | None = None
        self._told = False

    async def next(self) -> Delta | None:
        """As of `Generation`."""
        delta = await super().next()
        if delta is not None:
            self._first_s = self._first_s or self._since_s()
        return delta

    def done(self) -> None:
        """All of the answer has been made."""
        self._outcome = OK

    def failed(self, error: BaseException) -> None:
        """The client is told of an error, unless it has gone."""
        if not isinstance(error, ClientGoneError | ClientDisconnect):
            self._outcome, self._error = ERROR, error

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
        # No message of an error: it may quote what the client sent.
        error = None if self._error is None else error_code(self._error)
        reasons = [choice.finish_reason for choice in self.choices]
        ended = error or ", ".join(sorted({reason or "unfinished" for reason in reasons}))
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
                "error": error,
                "finish_reasons": reasons,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "first_token_s": None if self._first_s is None else round(self._first_s, 4),
                "seconds": round(seconds, 4),
            },
        )  # fmt: skip

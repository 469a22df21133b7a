"""What an Ingress replica publishes: requests to generate, from their arrival to whatever ends them, once each.

    arrival ──> refused (an error) ......................................................> end
            └─> first token ──> ... ──> each choice's finish reason ──> all handed over ──> end
                                    └─> an error, or the client is gone ──────────────────> end

Knows no Ray: numbers go to a `Meter`. Pure but for the clock, which is passed in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from types import TracebackType

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster import errors
from cluster.errors import error_code
from cluster.metering import Meter
from cluster.metrics import (
    FINISHED_CHOICES,
    FIRST_TOKEN_S,
    NEXT_TOKEN_S,
    OPEN_REQUESTS,
    REQUEST_ERRORS,
    REQUEST_S,
    REQUESTS,
    RESUMED_REQUESTS,
    Metric,
)
from cluster.metrics_page import ENDPOINTS, FINISH_REASONS, OUTCOMES
from deployments.ingress.choices import Choice
from deployments.ingress.errors import ClientGoneError

CHAT, COMPLETIONS = ENDPOINTS
OK, ERROR, CLIENT_GONE = OUTCOMES
USUAL_ERRORS = (
    errors.RequestError,
    errors.ModelNotFoundError,
    errors.AuthenticationError,
    errors.BodyTooLargeError,
    errors.SlowBodyError,
    errors.HeadersTooLargeError,
    errors.OverloadedError,
    errors.RateLimitError,
    errors.DeadlineError,
    errors.ExpertsUnavailableError,
    errors.RouterStoppingError,
    errors.EngineError,
)
"""Those a request can end with in a healthy design; their series begin at 0, any other one's with the first error."""

Handler = Callable[[Request], Awaitable[Response]]


class _Nowhere:
    """`Instruments` of a process that publishes nothing."""

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...

    def begin(self, metric: Metric, labels: Mapping[str, str]) -> None: ...

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...


class RequestMetering:
    """One per Ingress replica, in its event loop. clock: seconds, monotonic."""

    def __init__(self, meter: Meter | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.meter = Meter(_Nowhere()) if meter is None else meter
        self.clock = clock
        self.open = 0
        self._begin()

    def counting(self, endpoint: str) -> Callable[[Handler], Handler]:
        """What wraps a handler so that its requests are counted; it finds its own as `request.state.metered`."""

        def counted(handler: Handler) -> Handler:
            async def handle(request: Request) -> Response:
                with Metered(self, endpoint) as metered:
                    request.state.metered = metered
                    return await handler(request)

            return handle

        return counted

    def resumed(self) -> None:
        """A prompt goes on at another router."""
        self.meter.count(RESUMED_REQUESTS)

    def tell(self, meter: Meter) -> None:
        """A `Source`, once a second: what is no event."""
        meter.level(OPEN_REQUESTS, self.open)

    def _begin(self) -> None:
        self.meter.count(RESUMED_REQUESTS, 0)
        for reason in FINISH_REASONS:
            self.meter.count(FINISHED_CHOICES, 0, reason=reason)
        for endpoint in ENDPOINTS:
            for outcome in OUTCOMES:
                self.meter.count(REQUESTS, 0, endpoint=endpoint, outcome=outcome)
            for kind in USUAL_ERRORS:
                self.meter.count(REQUEST_ERRORS, 0, endpoint=endpoint, code=error_code(kind("")))


@dataclass(slots=True)
class _Heard:
    """Of one choice: when its first chunk came, of how many tokens, and when its last one did, in seconds."""

    first_s: float
    first_tokens: int
    last_s: float
    tokens: int


class Metered:
    """One request. Ends with its `with` block, or with `ended` where it is told to `keep`, as a `Lease` does.

    Whoever never says `done` or `failed` had a client that went away.
    """

    def __init__(self, metering: RequestMetering, endpoint: str) -> None:
        self._metering = metering
        self._endpoint = endpoint
        self._began_s = metering.clock()
        self._heard: dict[Choice, _Heard] = {}
        self._outcome = CLIENT_GONE
        self._code = ""
        self._kept = False
        self._closed = False

    def heard(self, choice: Choice) -> None:
        """A chunk has been added to `choice`."""
        now, tokens = self._metering.clock(), choice.completion_tokens
        known = self._heard.get(choice)
        if known is None and tokens:
            if not self._heard:
                since_s = now - self._began_s
                self._metering.meter.observe(FIRST_TOKEN_S, since_s, endpoint=self._endpoint)
            self._heard[choice] = _Heard(now, tokens, now, tokens)
        elif known is not None and tokens > known.tokens:
            known.last_s, known.tokens = now, tokens

    def done(self) -> None:
        """All of the answer has been handed over."""
        self._outcome = OK

    def failed(self, error: BaseException) -> None:
        """The client was told of an error."""
        self._outcome, self._code = ERROR, error_code(error)

    def keep(self) -> None:
        """The answer outlives the block: whoever goes on with it calls `ended`."""
        self._kept = True

    def ended(self, choices: Collection[Choice]) -> None:
        """Nothing more will come of these choices. Counts once."""
        heard, self._heard = self._heard, {}
        for choice in choices:
            if choice in heard and choice.finish_reason is not None:
                self._finished(choice.finish_reason, heard[choice])
        if self._kept:
            self._close()

    def _finished(self, reason: str, heard: _Heard) -> None:
        meter = self._metering.meter
        meter.count(FINISHED_CHOICES, reason=reason)
        # A chunk may hold several tokens: those of the first one came at once, for all one can tell.
        if following := heard.tokens - heard.first_tokens:
            meter.observe(NEXT_TOKEN_S, (heard.last_s - heard.first_s) / following, endpoint=self._endpoint)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        metering, endpoint = self._metering, self._endpoint
        metering.open -= 1
        metering.meter.count(REQUESTS, endpoint=endpoint, outcome=self._outcome)
        if self._outcome == ERROR:
            metering.meter.count(REQUEST_ERRORS, endpoint=endpoint, code=self._code)
        elif self._outcome == OK:
            metering.meter.observe(REQUEST_S, metering.clock() - self._began_s, endpoint=endpoint)

    def __enter__(self) -> Metered:
        self._metering.open += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._kept:
            return
        if error is None:
            self.done()
        elif not isinstance(error, ClientGoneError | ClientDisconnect | asyncio.CancelledError):
            self.failed(error)
        self._close()

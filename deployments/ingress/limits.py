"""What one API key may use: requests and tokens a minute, streams under way at once.

A stream is one choice of one prompt: a request makes as many as it has prompts, times `n`. It counts as one until its
body has been read, then as what it makes, whether the answer is streamed or not, and until it has ended as a whole.

Token buckets (https://en.wikipedia.org/wiki/Token_bucket): a bucket holds one minute's worth, is full at first, and
fills at an even rate, so a client may use a minute's worth at once and then goes on at the rate. A request is admitted
while tokens are left, and pays when it has ended, when its usage is known: what was under way together may leave the
bucket in debt, which is paid off before the next one is admitted.

Counts are of this Ingress replica alone. Knows no HTTP; the clock is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

from cluster.errors import OverloadedError, RateLimitError, RequestError
from deployments.ingress.keys import KeyLimits, KeyRecord

MINUTE_S = 60.0


class Bucket:
    """`per_min` units a minute. level: what is left, negative where more was used than there was."""

    def __init__(self, per_min: int, now: float) -> None:
        self.per_min = per_min
        self.level = float(per_min)
        self._at = now

    def resize(self, per_min: int) -> None:
        """The limit was edited: the bucket stays as full or as indebted as it is, up to the new size."""
        self.per_min = per_min
        self.level = min(self.level, float(per_min))

    def fill(self, now: float) -> None:
        """Add what the time since the last call has brought. A clock that steps back brings nothing."""
        elapsed_s = max(0.0, now - self._at)
        self.level = min(float(self.per_min), self.level + elapsed_s * self.per_min / MINUTE_S)
        self._at = now

    def wait_s(self, level: float) -> float:
        """Seconds until there will be at least `level`; 0 when there is."""
        return max(0.0, (level - self.level) * MINUTE_S / self.per_min)


class _Use:
    """What one key has used so far."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.streams = 0

    def follow(self, limits: KeyLimits, now: float) -> None:
        """Limits as they are in the key file now."""
        self.requests = _followed(self.requests, limits.requests_per_min, now)
        self.tokens = _followed(self.tokens, limits.tokens_per_min, now)


def _followed(bucket: Bucket | None, per_min: int | None, now: float) -> Bucket | None:
    if per_min is None:
        return None
    if bucket is None:
        return Bucket(per_min, now)
    bucket.fill(now)
    if bucket.per_min != per_min:
        bucket.resize(per_min)
    return bucket


class Lease:
    """One admitted request of one key. Ends with its `with` block, or with `ended` where it is told to `keep`.

    most: streams of the key at once. None for `use`: nothing is limited.
    """

    def __init__(self, use: _Use | None, clock: Callable[[], float], most: int | None = None) -> None:
        self._use = use
        self._clock = clock
        self._most = most
        self._streams = 1
        self._tokens = 0
        self._kept = False

    def widen(self, streams: int) -> None:
        """The request turns out to make that many streams: from now on it counts as these.

        Raises:
            RequestError: it makes more than the key may ever have at once.
            RateLimitError: it makes more than are free now; as a request it counts, because its body has been read.
        """
        use = self._use
        if use is None:
            return
        others = use.streams - self._streams
        if self._most is not None and streams > self._most:
            message = f"The request makes {streams} streams (prompts times 'n'); this API key may have {self._most}."
            raise RequestError(message, "n", "invalid_value")
        if self._most is not None and others + streams > self._most:
            what = f"has {others} streams under way and asks for {streams}; its limit streams is {self._most}"
            raise _reached(what, 1.0)
        use.streams += streams - self._streams
        self._streams = streams

    def keep(self) -> None:
        """The request outlives the block: whoever goes on with it calls `ended`."""
        self._kept = True

    def ended(self, tokens: int) -> None:
        """The request has ended, in whatever way, and has used `tokens`. Counts once."""
        self._tokens = tokens
        if self._kept:
            self._release()

    def _release(self) -> None:
        use, self._use = self._use, None
        if use is None:
            return
        use.streams -= self._streams
        if use.tokens is not None:
            use.tokens.fill(self._clock())
            use.tokens.level -= self._tokens

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OverloadedError):
            self._tokens = 0  # refused by a full queue: nothing was computed
        if not self._kept or error is not None:
            self._release()


class Limiter:
    """Admits requests by the limits of their keys. clock: seconds that rise."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By digest, not by name: a name given to another key starts anew. Only keys of the key files ever get here.
        self._uses: dict[bytes, _Use] = {}

    def admit(self, key: KeyRecord | None) -> Lease:
        """A lease for one request of `key`; None, where no key is asked for, has no limits.

        Raises:
            RateLimitError: a limit is reached; a refused request uses nothing up.
        """
        if key is None or key.limits == KeyLimits():
            return Lease(None, self._clock)
        use, limits = self._uses.setdefault(key.digest, _Use()), key.limits
        use.follow(limits, self._clock())
        if limits.streams is not None and use.streams >= limits.streams:
            raise _reached(f"has {use.streams} streams under way; its limit streams is {limits.streams}", 1.0)
        # Any positive rest admits: how much a request will use is not known before it has ended.
        if use.tokens is not None and use.tokens.level <= 0:
            wait_s = use.tokens.wait_s(1.0)
            raise _reached(f"has used its tokens; its limit tokens_per_min is {limits.tokens_per_min}", wait_s)
        if use.requests is not None:
            if use.requests.level < 1:
                wait_s = use.requests.wait_s(1.0)
                raise _reached(f"sends too often; its limit requests_per_min is {limits.requests_per_min}", wait_s)
            use.requests.level -= 1
        use.streams += 1
        return Lease(use, self._clock, limits.streams)


def _reached(what: str, wait_s: float) -> RateLimitError:
    after_s = max(1, math.ceil(wait_s))
    return RateLimitError(f"This API key {what}; try again in {after_s} s.", after_s)

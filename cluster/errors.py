"""Every error ExpertScale raises on purpose, with its HTTP status and whether a retry can help.

ExpertScaleError
├── ConfigError              a setting is wrong; found before anything starts
│   ├── CheckpointError      the model folder is missing, damaged or incomplete
│   │   └── UnsupportedModelError   the model cannot be split; says why
│   └── PlacementError       experts and groups do not match
├── RequestError             400, the client must change its request
│   ├── ModelNotFoundError   404
│   ├── AuthenticationError  401
│   ├── BodyTooLargeError    413
│   ├── HeadersTooLargeError 431
│   └── SlowBodyError        408, the body did not arrive in time
├── OverloadedError          429, come back after `retry_after_s`
│   └── RateLimitError       429, the API key has used up one of its limits
├── DeadlineError            504, the request's own deadline has passed
├── ExpertsUnavailableError  503, no replica of a needed group answered in time
├── DirectoryUnavailableError  503, the Directory does not answer; it may be restarting
├── RouterStoppingError      503, this router is going away: another one can take over
├── ReplicaStartError        a replica cannot start
├── EngineError              500, a step failed; only its requests are affected
└── FabricError              between router and expert replica; the dispatcher handles it
    ├── FrameError           bytes that are no valid frame
    ├── HandshakeError       wrong key, wrong digest, wrong version
    └── ReplicaLostError     connection broken, timed out or draining: send elsewhere
"""

from __future__ import annotations

import re
from collections.abc import Iterator


class ExpertScaleError(Exception):
    """Base of every deliberate error. `status` is what HTTP clients see; `retryable` whether trying again can help."""

    status = 500
    retryable = False
    kind = "server_error"


class ConfigError(ExpertScaleError):
    """A setting is wrong. The message is one sentence naming the key, the value and what is allowed."""

    kind = "config_error"


class CheckpointError(ConfigError):
    """The model folder is missing, damaged or incomplete."""


class UnsupportedModelError(CheckpointError):
    """The model cannot be split into router and experts; the message says why and what is supported."""


class PlacementError(ConfigError):
    """Experts and groups do not match: an expert in two groups or in none, an empty group, too many groups."""


class RequestError(ExpertScaleError):
    """The client must change its request. `param` names the offending field in the client's own words."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders through Serve: keep the fields that Exception's own pickling drops.
        return (type(self), (str(self), self.param, self.code))


class ModelNotFoundError(RequestError):
    """The request names a model this server does not serve."""

    status = 404


class AuthenticationError(RequestError):
    """The API key is missing or unknown."""

    status = 401
    kind = "authentication_error"


class BodyTooLargeError(RequestError):
    """The request body exceeds the limit."""

    status = 413


class SlowBodyError(RequestError):
    """The request's body did not arrive in time."""

    status = 408


class HeadersTooLargeError(RequestError):
    """The request's headers exceed the limit."""

    status = 431


class OverloadedError(ExpertScaleError):
    """Every queue is full. `retry_after_s` is a guess at when it is worth coming back."""

    status = 429
    retryable = True
    kind = "overloaded_error"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.retry_after_s))


class RateLimitError(OverloadedError):
    """The API key has used up one of its own limits; the message says which. The server may well be idle."""

    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineError(ExpertScaleError):
    """The request's own deadline passed before it finished."""

    status = 504
    kind = "deadline_error"


class ExpertsUnavailableError(ExpertScaleError):
    """No replica of a needed expert group answered within `experts.wait_s`."""

    status = 503
    retryable = True
    kind = "experts_unavailable"


class DirectoryUnavailableError(ExpertScaleError):
    """The Directory does not answer, so nobody can say how the cluster is. Requests do not need it."""

    status = 503
    retryable = True
    kind = "directory_unavailable"


class RouterStoppingError(ExpertScaleError):
    """This router is going away. Another one can take the request, or resume it after the tokens delivered."""

    status = 503
    retryable = True
    kind = "router_stopping"


class ReplicaStartError(ExpertScaleError):
    """A replica cannot start; the message says in one sentence which and why."""

    kind = "replica_start_error"


class EngineError(ExpertScaleError):
    """A step failed for a reason of ours. Only the requests of that step are affected."""

    kind = "engine_error"


class FabricError(ExpertScaleError):
    """Something between a router and an expert replica; the dispatcher turns it into a resend."""

    kind = "fabric_error"


class FrameError(FabricError):
    """Bytes that are no valid frame. The connection they came from is closed with this reason."""


class HandshakeError(FabricError):
    """The other side has the wrong cluster key, model digest or wire version."""


class ReplicaLostError(FabricError):
    """A connection broke, timed out or is draining: its rows must be sent elsewhere."""

    retryable = True


UNFORESEEN = "unforeseen"


def error_code(error: BaseException) -> str:
    """The class of an error as metrics name it: `rate_limit` for a RateLimitError.

    >>> error_code(RateLimitError("too often")), error_code(KeyError("x"))
    ('rate_limit', 'unforeseen')
    """
    return _code(type(error)) if isinstance(error, ExpertScaleError) else UNFORESEEN


def error_codes() -> list[str]:
    """All that `error_code` can return."""
    return [*(_code(kind) for kind in _tree(ExpertScaleError)), UNFORESEEN]


def _tree(kind: type[ExpertScaleError]) -> Iterator[type[ExpertScaleError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == __name__:
            yield from _tree(child)


def _code(kind: type[ExpertScaleError]) -> str:
    # The nearest class of this file: another file's own one is nobody's to know.
    known = next(each for each in kind.__mro__ if each.__module__ == __name__)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", known.__name__.removesuffix("Error")).lower()

"""Bytes of a request body to a checked body object, or one RequestError that names the field.

Knows JSON and pydantic's errors, not what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import BodyTooLargeError, HeadersTooLargeError, RequestError, SlowBodyError
from deployments.ingress.schemas import Body

T = TypeVar("T", bound=Body)

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
SESSION_HEADER = "x-session-id"
MAX_SESSION_CHARS = 512
MAX_DEPTH = 32
"""Levels of arrays and objects. Bodies that mean something have six."""
PRIVATE = frozenset(["messages", "content", "text", "prompt", "stop", "name", "tool_call_id", "user"])
"""Fields in which the client's own words stand: wrong values are not repeated in errors."""
_MAX_DIGITS = 40


async def read_body(
    chunks: AsyncIterator[bytes], headers: Mapping[str, str], limit_bytes: int, timeout_s: float
) -> bytes:
    """The whole body. Stops reading as soon as it is known to be longer than `limit_bytes`, and after `timeout_s`.

    Raises:
        BodyTooLargeError: by the content-length header or by counting. SlowBodyError: the time was up before its end.
        RequestError: the body is compressed.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("Compressed request bodies are not supported; send plain JSON.", code="invalid_encoding")
    declared = headers.get("content-length", "")
    size = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0
    parts: list[bytes] = []
    received = 0
    if size <= limit_bytes:
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in chunks:
                    parts.append(chunk)
                    received += len(chunk)
                    if received > limit_bytes:
                        break
        except TimeoutError:
            message = f"The request body did not arrive within {timeout_s:g} s."
            raise SlowBodyError(message, code="request_timeout") from None
    if max(size, received) > limit_bytes:
        raise BodyTooLargeError(f"The request body is larger than {limit_bytes} bytes.", code="body_too_large")
    return b"".join(parts)


def check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raises HeadersTooLargeError for headers that no client of this API needs."""
    if len(headers) > MAX_HEADERS:
        message = f"The request has {len(headers)} headers; at most {MAX_HEADERS} are read."
        raise HeadersTooLargeError(message, code="headers_too_large")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes."
        raise HeadersTooLargeError(message, code="headers_too_large")


def parse_body(raw: bytes, kind: type[T]) -> T:
    """The body as a `kind`.

    Raises:
        RequestError: not JSON, or not a valid body; `param` is the path of the first offending field.
    """
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("The request body should be a JSON object.", code="invalid_json")
    _check_depth(value)
    if rb"\ud" in raw.lower():  # only an escape can bring one in
        _refuse_lone_surrogates(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0]) from None


def parse_json(raw: bytes) -> Any:
    """Any JSON value. NaN and infinities pass: the field they are in refuses them by name."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"The request body is not valid UTF-8: byte {error.start} ({raw[error.start]:#04x}) is wrong."
        raise RequestError(message, code="invalid_utf8") from None
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of thousands of digits
            return json.loads(text, parse_int=_bounded_int)
    except json.JSONDecodeError as error:
        message = f"The request body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}."
        raise RequestError(message, code="invalid_json") from None
    except RecursionError:
        raise RequestError("The request body is nested too deeply.", code="invalid_json") from None


def _check_depth(value: Any) -> None:
    """Nested values cost whoever walks them a call a level: refused before anything else walks them."""
    level = [value]
    for _ in range(MAX_DEPTH):
        items = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise RequestError(f"The request body is nested more than {MAX_DEPTH} levels deep.", code="invalid_json")


def _refuse_lone_surrogates(value: dict[str, Any]) -> None:
    """Half of a surrogate pair is valid JSON but no text: no tokenizer takes it."""
    location: tuple[int | str, ...] = ()
    container: Any = value
    while container is not None and not _is_text(container):
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in items:
            if (isinstance(item, str | dict | list) and not _is_text(item)) or not _is_text(key):
                location += (key,)
                container = item if isinstance(item, dict | list) else None
                break
    if location:
        param = path(location)
        raise RequestError(f"'{param}' holds a lone surrogate, which is no character.", param, "invalid_value")


def _is_text(value: Any) -> bool:
    """Can everything in `value` be written as UTF-8? At the speed of the C encoder."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounded_int(digits: str) -> int:
    """A number far outside every field's range stays far outside; Python refuses to convert thousands of digits."""
    return int(digits[:_MAX_DIGITS])


def _request_error(detail: ErrorDetails) -> RequestError:
    unknown = detail.get("ctx", {}).get("unknown")
    param = path(detail["loc"] if unknown is None else (*detail["loc"], unknown))
    if detail["type"] == "missing":
        return RequestError(f"The required field '{param}' is missing.", param, "missing_required_parameter")
    if unknown is not None or detail["type"] == "extra_forbidden":
        return RequestError(f"Unknown field '{param}'.", param, "unknown_parameter")
    if detail["type"] == "unsupported":
        return RequestError(f"'{param}' is not supported: {detail['msg']}.", param, "unsupported_parameter")
    return RequestError(f"Invalid value for '{param}'{_shown(detail)}: {detail['msg']}.", param, "invalid_value")


def path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("<"):
            text += f".{part}" if text else part
    return text


def _shown(detail: ErrorDetails) -> str:
    """The offending value where it is short enough to help, and not from where the client's own words stand.

    Error texts end up in logs, the client's at least, and prompts should not.
    """
    value = detail["input"]
    names = [part for part in detail["loc"] if isinstance(part, str) and not part.startswith("<")]
    if not PRIVATE.isdisjoint(names[-1:]):
        return ""
    if isinstance(value, bool | int | float | str):
        if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
            return ""
        shown = json.dumps(value)
        return f" ({shown})" if len(shown) <= 60 else ""
    return ""

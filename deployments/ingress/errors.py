"""Errors as OpenAI's error objects: {"error": {"message", "type", "param", "code"}} and an HTTP status.

Errors of `cluster.errors` speak for themselves. Anything else is ours to read in the log: the client gets one general
sentence, never a stack trace.
"""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import AuthenticationError, ExpertScaleError, OverloadedError, RequestError
from cluster.serve_logging import about

log = logging.getLogger(__name__)

_MAX_CHARS = 2000


class ClientGoneError(Exception):
    """The client closed the connection: nobody waits for an answer any more."""


def error_object(error: Exception, request_id: str = "") -> dict[str, Any]:
    """The body for any error. Logs what the client is not told, about the request of that id."""
    if isinstance(error, HTTPException):
        return _body(str(error.detail), "invalid_request_error", None, _HTTP_CODES.get(error.status_code))
    if isinstance(error, RequestError):
        return _body(str(error), error.kind, error.param, error.code)
    if isinstance(error, ExpertScaleError):
        if error.status == 500:
            log.error("a request failed", exc_info=error, extra=about(request_id))
        return _body(str(error), error.kind, None, getattr(error, "code", None))
    # Not the error's own text: a library's error may quote what it was given, which is the client's prompt.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error(
        "a request failed in a way nobody foresaw, with %s:\n%s", type(error).__name__, where, extra=about(request_id)
    )
    return _body("The server failed to answer this request; its log says why.", "server_error", None, None)


def error_response(error: Exception, request_id: str = "") -> Response:
    """The HTTP answer for any error raised before the first byte of a response. request_id: as of `error_object`."""
    headers: dict[str, str] = {}
    status = 500
    if isinstance(error, HTTPException):
        status = error.status_code
        headers = dict(error.headers or {})
    elif isinstance(error, ExpertScaleError):
        status = error.status
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    body = error_object(error, request_id)
    # Not the message, nor the field's name: they may hold the client's words.
    what = {"status": status, "error": type(error).__name__, "code": body["error"]["code"]}
    log.info("answered with %d: %s, %s", *what.values(), extra=about(request_id) | what)
    return json_response(body, status, headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII-only JSON: text quoted from a bad request may hold surrogates that UTF-8 cannot carry."""
    content = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
    return Response(content, status_code=status, headers=headers, media_type="application/json")


_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message[:_MAX_CHARS], "type": kind, "param": param and param[:200], "code": code}}

"""The API's own description, OpenAPI 3.1, from the very models requests are checked with and answers are made of.

Served at /openapi.json. What depends on the model (token ids, context length) is no part of it: such a request fits
the schema and is answered 400 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from cluster.health_reasons import Reason
from deployments.ingress import request_ids
from deployments.ingress.deadlines import HEADER as TIMEOUT_HEADER
from deployments.ingress.experts_used import EXPERTS_HEADER, KEY
from deployments.ingress.parsing import MAX_HEADER_BYTES, MAX_SESSION_CHARS, SESSION_HEADER
from deployments.ingress.schemas import MAX_TIMEOUT_S, ChatBody, CompletionBody

VERSION = "1"
JSON, EVENTS, HTML = "application/json", "text/event-stream", "text/html"
_AT = "#/components/schemas/"
_PROBLEMS = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or not one of this server's.",
    404: "There is no such model.",
    408: "The body did not arrive in time, or the request's own deadline has passed.",
    413: "The body is too large.",
    429: "The server is full, or the key has used up one of its limits; Retry-After says when to come back.",
    431: f"The headers are larger than {MAX_HEADER_BYTES} bytes.",
    500: "The server failed; its log says why.",
    503: "A part of the cluster is missing; trying again can help.",
    504: "The request took too long.",
}
_GENERATING = (400, 401, 404, 408, 413, 429, 431, 500, 503, 504)
_ASKING = (401, 431)

Document = dict[str, Any]


@cache
def document() -> Document:
    """The whole description. The same object each time: not to be changed."""
    schemas: Document = {"Error": _ERROR, "Health": _HEALTH}
    for model, mode in ((ChatBody, "validation"), (CompletionBody, "validation")):
        _collect(schemas, model, mode)
    for answer in (ChatCompletion, Completion, Model):
        _collect(schemas, answer, "serialization", prefix="Answer")
    return {
        "openapi": "3.1.0",
        "info": {"title": "ExpertScale", "version": VERSION},
        "paths": dict(_paths()),
        "components": {
            "schemas": schemas,
            "headers": {"RequestId": _ANSWERED_ID},
            "parameters": {"RequestId": _ASKED_ID},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Asked for where the server has keys; the empty alternative is a server without.
        "security": [{"key": []}, {}],
    }


def _collect(schemas: Document, model: type[BaseModel], mode: Any, prefix: str = "") -> None:
    """Add the schema of `model` and of its parts; prefix: keeps apart what has the same name elsewhere."""
    template = f"{_AT}{prefix}{model.__name__}.{{model}}"
    whole = model.model_json_schema(mode=mode, ref_template=template)
    for name, part in whole.pop("$defs", {}).items():
        schemas[f"{prefix}{model.__name__}.{name}"] = part
    schemas[f"{prefix}{model.__name__}"] = whole


def _paths() -> Iterator[tuple[str, Document]]:
    yield "/v1/chat/completions", {"post": _generating(ChatBody, ChatCompletion)}
    yield "/v1/completions", {"post": _generating(CompletionBody, Completion)}
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("AnswerModel")}})
    yield "/v1/models", {"get": _asking("The served model, as a list.", models)}
    yield "/v1/models/{name}", {"get": _asking("The served model.", _ref("AnswerModel"), 404), **_in_path("name")}
    cluster = "Groups, replicas, routers and the last scaling decisions. Needs an admin key where the server has keys."
    yield "/v1/cluster", {"get": _asking(cluster, {"type": "object"}, 500, 503)}
    loads = "Rows by expert, as a placement takes them. Needs an admin key where the server has keys."
    yield "/v1/cluster/loads", {"get": _asking(loads, {"type": "object"}, 500, 503)}
    answers = {"200": _answer("Ready.", _ref("Health")), "503": _answer("Not ready.", _ref("Health"))}
    yield "/health", {"get": _open("Can a request be served now?", answers)}
    yield "/openapi.json", {"get": _asking("This document.", {"type": "object"})}
    # Any type of content: its files are scripts, styles and pictures as well.
    page, file = (_answer(text, _TEXT, kind) for text, kind in (("The page.", HTML), ("Its content.", "*/*")))
    unchanged = {"304": {"description": "As it was when it had the tag of If-None-Match.", **_TOLD}}
    yield "/dashboard", {"get": _open("The live page.", {"200": page} | unchanged)}
    files = {"200": file} | unchanged | _problems(404)
    yield "/dashboard/{file}", {"get": _open("A file of the live page.", files), **_in_path("file")}
    seen = "What the live page shows, once a second. Needs an admin key where the server has keys."
    events = _answer("The events: `data` is health, cluster, rates and rows by expert as JSON.", _EVENT, EVENTS)
    yield "/dashboard/events", {"get": _operation(seen, {"200": events} | _problems(*_ASKING, 429))}


def _generating(body: type[BaseModel], answer: type[BaseModel]) -> Document:
    done = _answer("Done; a stream of events where `stream` is true.", _ref(f"Answer{answer.__name__}"))
    done["content"][EVENTS] = {"schema": _EVENT}
    operation = _operation("Generate.", {"200": done} | _problems(*_GENERATING))
    operation["parameters"] += [_header(*each) for each in _GENERATING_HEADERS]
    return operation | {"requestBody": {"required": True, "content": {JSON: {"schema": _ref(body.__name__)}}}}


def _asking(summary: str, schema: Document, *problems: int) -> Document:
    return _operation(summary, {"200": _answer("Here.", schema)} | _problems(*_ASKING, *problems))


def _open(summary: str, answers: Document) -> Document:
    """What nobody needs a key for."""
    return _operation(summary, answers | _problems(431)) | {"security": [{}]}


def _operation(summary: str, answers: Document) -> Document:
    return {
        "summary": summary,
        "parameters": [{"$ref": "#/components/parameters/RequestId"}],
        "responses": answers,
    }


def _in_path(name: str) -> Document:
    schema = {"type": "string", "minLength": 1}
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": schema}]}


def _header(name: str, schema: Document, description: str) -> Document:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def _problems(*statuses: int) -> Document:
    return {str(status): _answer(_PROBLEMS[status], _ref("Error")) for status in sorted(statuses)}


def _answer(description: str, schema: Document, kind: str = JSON) -> Document:
    return {"description": description, **_TOLD, "content": {kind: {"schema": schema}}}


def _ref(name: str) -> Document:
    return {"$ref": _AT + name}


def _object(properties: Document) -> Document:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_TOLD = {"headers": {request_ids.HEADER: {"$ref": "#/components/headers/RequestId"}}}
_ANSWERED_ID = {
    "description": "Of this request, in every line of the log about it: the one it brought, or a new one.",
    "required": True,
    "schema": {"type": "string", "minLength": 1, "maxLength": request_ids.MAX_CHARS},
}
# Any text is allowed: what is no id is not refused, but replaced.
_ASKED_ID = _header(
    request_ids.HEADER,
    _TEXT,
    f"The id to give this request: 1 to {request_ids.MAX_CHARS} visible ASCII characters. Where it is missing, given "
    "twice or anything else, a new one is made. It need not be unique.",
)
_GENERATING_HEADERS: tuple[tuple[str, Document, str], ...] = (
    (
        TIMEOUT_HEADER,
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
        "Seconds from the request's arrival to the end of its answer, if that is less than this server's limit.",
    ),
    (
        EXPERTS_HEADER,
        {"type": "string", "enum": ["true", "false"]},
        f"Whether to tell which experts were used, by layer: as `{KEY}` of every chunk, or of the whole answer.",
    ),
    (
        SESSION_HEADER,
        {"type": "string", "maxLength": MAX_SESSION_CHARS},
        "Requests that share it prefer the same router, which may know their beginning. Else `user` stands for it.",
    ),
    ("traceparent", _TEXT, "W3C Trace Context: where traces are on, that of this request goes on below it."),
)
_ERROR = _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL})})
# OpenAPI 3.1 describes a stream by its items.
_EVENT = {
    "type": "object",
    "description": "`data` is a chunk as JSON, at last [DONE], or an error that ends the stream in its place.",
    "properties": {"data": _TEXT},
    "required": ["data"],
}
_HEALTH = {
    "type": "object",
    "properties": {
        "status": {"enum": ["ok", "unavailable"]},
        "missing": {"type": "array", "items": _TEXT},
        "degraded": {"type": "array", "items": {"enum": [reason.value for reason in Reason]}},
        "reasons": {"type": "object", "additionalProperties": _TEXT},
    },
    "required": ["status", "missing"],
    "additionalProperties": False,
}

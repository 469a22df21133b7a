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
from deployments.ingress.parsing import MAX_HEADER_BYTES
from deployments.ingress.schemas import ChatBody, CompletionBody

VERSION = "1"
JSON, EVENTS = "application/json", "text/event-stream"
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
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
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
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    one = _asking("The served model.", _ref("AnswerModel"), 404) | {"parameters": [name]}
    yield "/v1/models/{name}", {"get": one}
    cluster = "Groups, replicas, routers and the last scaling decisions. Needs an admin key where the server has keys."
    yield "/v1/cluster", {"get": _asking(cluster, {"type": "object"}, 500, 503)}
    loads = "Rows by expert, as a placement takes them. Needs an admin key where the server has keys."
    yield "/v1/cluster/loads", {"get": _asking(loads, {"type": "object"}, 500, 503)}
    answers = {"200": _answer("Ready.", _ref("Health")), "503": _answer("Not ready.", _ref("Health"))}
    health = {"summary": "Can a request be served now?", "security": [{}], "responses": answers | _problems(431)}
    yield "/health", {"get": health}
    yield "/openapi.json", {"get": _asking("This document.", {"type": "object"})}


def _generating(body: type[BaseModel], answer: type[BaseModel]) -> Document:
    done = _answer("Done; a stream of events where `stream` is true.", _ref(f"Answer{answer.__name__}"))
    done["content"][EVENTS] = {"schema": _EVENT}
    return {
        "summary": "Generate.",
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref(body.__name__)}}},
        "responses": {"200": done} | _problems(*_GENERATING),
    }


def _asking(summary: str, schema: Document, *problems: int) -> Document:
    return {"summary": summary, "responses": {"200": _answer("Here.", schema)} | _problems(*_ASKING, *problems)}


def _problems(*statuses: int) -> Document:
    return {str(status): _answer(_PROBLEMS[status], _ref("Error")) for status in sorted(statuses)}


def _answer(description: str, schema: Document) -> Document:
    return {"description": description, "content": {JSON: {"schema": schema}}}


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

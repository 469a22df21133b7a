"""What the API says of itself, and 2,000 generated requests against it: none fails, every answer fits (40 s)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.ingress.deadlines import HEADER as TIMEOUT_HEADER
from deployments.ingress.openapi import document
from deployments.ingress.schemas import ChatBody, CompletionBody
from tests.deployments.ingress.fakes import http, make_service, says

# Not schemathesis's own check for server errors: it counts the 504 of a request that asks for too short a time.
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(document())
SENT: Counter[str] = Counter()
"""Statuses of all generated requests of this module."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with asyncio.Runner() as runner:
        yield Server(runner)


async def stops() -> bool:
    return True


class Server:
    """The application over a router that answers every request, called without sockets."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        # It is to stop, so that streams of the live picture end at once.
        self._client = http(make_service(says("hello", finish="length"), leaving=stops))

    def answer(self, case: Any) -> httpx.Response:
        """The response to a generated case, as it would be sent."""
        sent = case.as_transport_kwargs(base_url="http://test")
        sent.pop("cookies", None)
        response = self._runner.run(self._client.request(**{"content" if k == "data" else k: sent[k] for k in sent}))
        SENT[f"{response.status_code}"] += 1
        return response


def judged(server: Server, case: Any, checks: list[Any]) -> httpx.Response:
    response = server.answer(case)
    case.validate_response(response, checks=checks)
    assert response.status_code < 500 or (response.status_code == 504 and allowed_s(case) < 1)
    if response.status_code >= 400 and "error" in response.json():
        error = response.json()["error"]
        assert error["message"].endswith(".") or error["code"] == "unknown_url"
    return response


def allowed_s(case: Any) -> float:
    """How long the request says it may take."""
    said = [(case.headers or {}).get(TIMEOUT_HEADER), case.body.get("timeout") if isinstance(case.body, dict) else None]
    return min(float(each) for each in said if each is not None)


def generated(examples: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)


CHAT, TEXT = SCHEMA["/v1/chat/completions"]["POST"], SCHEMA["/v1/completions"]["POST"]


@pytest.mark.parametrize("operation", [CHAT, TEXT], ids=["chat", "text"])
def test_what_fits_the_schema_is_answered_by_it(operation: Any, server: Server) -> None:
    statuses: Counter[int] = Counter()

    @generated(700)
    @given(case=operation.as_strategy(), served=st.sampled_from([True, True, True, False]))
    def check(case: Any, served: bool) -> None:
        if served:
            case.body["model"] = "demo"
        statuses[judged(server, case, CHECKS).status_code] += 1

    check()
    # A generated deadline may be shorter than a busy machine takes.
    assert statuses[200] + statuses[504] > 50, statuses
    assert statuses[200] > 20, statuses
    assert statuses.keys() <= {200, 400, 404, 408, 504}


@pytest.mark.parametrize("operation", [CHAT, TEXT], ids=["chat", "text"])
def test_what_does_not_fit_is_refused(operation: Any, server: Server) -> None:
    @generated(500)
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            # So little time that it is over before anything else is found wrong.
            if 0 < float(case.headers[TIMEOUT_HEADER]) < 1:
                case.headers[TIMEOUT_HEADER] = "30"
        assert 400 <= judged(server, case, [*CHECKS, negative_data_rejection]).status_code < 500

    check()


@pytest.mark.parametrize("path", [path for path, item in document()["paths"].items() if "get" in item])
def test_what_is_only_asked_for_is_answered_by_the_schema(path: str, server: Server) -> None:
    @generated(40)
    @given(case=SCHEMA[path]["GET"].as_strategy())
    def check(case: Any) -> None:
        judged(server, case, CHECKS)

    check()


def test_two_thousand_requests_were_sent(record_property: Callable[[str, object], None]) -> None:
    if not SENT:
        pytest.skip("the generated requests did not run in this process")
    assert SENT.total() >= 2000, SENT
    record_property("cases", dict(sorted(SENT.items())))


def test_the_document_is_served_as_it_is() -> None:
    async def get() -> httpx.Response:
        async with http(make_service(says("x"))) as client:
            return await client.get("/openapi.json")

    assert asyncio.run(get()).json() == json.loads(json.dumps(document()))


def test_every_field_that_is_read_is_described_and_no_other() -> None:
    schemas = document()["components"]["schemas"]
    for model in (ChatBody, CompletionBody):
        assert schemas[model.__name__]["properties"].keys() == model.model_fields.keys()
        assert schemas[model.__name__]["additionalProperties"] is False
    assert schemas["ChatBody"]["properties"]["tools"]["enum"] == [None, []]
    assert "anyOf" in schemas["CompletionBody"]["properties"]["prompt"]


def test_the_page_its_events_and_every_header_that_is_read_are_described() -> None:
    paths = document()["paths"]
    assert {"/dashboard", "/dashboard/{file}", "/dashboard/events"} <= paths.keys()
    for path in ("/v1/chat/completions", "/v1/completions"):
        described = {each["name"] for each in paths[path]["post"]["parameters"] if "name" in each}
        assert described == {"x-request-timeout-seconds", "x-expertscale-experts", "x-session-id", "traceparent"}
    for item in paths.values():
        for operation in (value for method, value in item.items() if method in ("get", "post")):
            assert {"$ref": "#/components/parameters/RequestId"} in operation["parameters"]
            assert all("x-request-id" in answer["headers"] for answer in operation["responses"].values())

"""One trace from an HTTP request to the steps of a real engine, through a real OTLP receiver. A few seconds."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from cluster import telemetry
from cluster.errors import EngineError
from deployments.generation import GenerationRequest, TokenChunk
from deployments.ingress.errors import ClientGoneError
from deployments.ingress.logged import LoggedGeneration
from deployments.ingress.tracing import tracing
from deployments.router.engine import Engine
from deployments.router.outbox import generate
from deployments.router.tracing import StepSpans, is_sampled
from tests.deployments.ingress.fakes import http, make_service, says
from tests.deployments.ingress.test_one_model import NEW, OLD, TWO, model_of
from tests.deployments.router.fake_backbone import FakeBackbone
from tests.otlp import ReceivedSpan, Receiver, receiving
from tests.spans import BrokenTracer, KeptSpans

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-00"}
PROMPT = [5, 6, 7, 8, 9, 10]
# Names that were given up again are still listed there, as deprecated.
DEPRECATED = {"gen_ai.system", "gen_ai.prompt", "gen_ai.completion", "gen_ai.usage.prompt_tokens"}
CONVENTIONS = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")} - DEPRECATED


class EngineRouter:
    """A `RouterClient` over an engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, request: GenerationRequest, session_id: str | None) -> AsyncGenerator[TokenChunk, None]:  # noqa: ARG002
        async for message in generate(self._engine, request):
            if isinstance(message, TokenChunk):
                yield message


@contextmanager
def exporting(endpoint: str, monkeypatch: pytest.MonkeyPatch, **settings: str) -> Iterator[list[Any]]:
    """The tracers of an ingress and a router. What they have is sent at the end."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **settings}.items():
        monkeypatch.setenv(name, value)
    tracers: list[Any] = [telemetry.tracer(name, {}, os.environ) for name in ("ingress", "router")]
    try:
        yield tracers
    finally:
        for each in tracers:
            each.span_processor.shutdown()


def ask(tracers: list[Any], *bodies: dict[str, Any], headers: dict[str, str] = SAMPLED) -> list[httpx.Response]:
    """Completions, all at once."""
    engine = Engine(
        FakeBackbone(), max_batch_tokens=8, max_sequences=8, max_queued_requests=8, tracing=StepSpans(tracers[1])
    )

    async def call() -> list[httpx.Response]:
        async with http(make_service(says(""), router=EngineRouter(engine), tracer=tracers[0])) as client:
            posts = [
                asyncio.create_task(client.post("/v1/completions", json={"model": "demo", **body}, headers=headers))
                for body in bodies
            ]
            while len(engine._inbox) < len(bodies) and not any(
                post.done() for post in posts
            ):  # they shall share their steps
                await asyncio.sleep(0)
            engine.start()
            return await asyncio.gather(*posts)

    try:
        return asyncio.run(call())
    finally:
        engine.stop()


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "seed": 1, "logit_bias": {"0": -100}} | fields


def named(receiver: Receiver, name: str) -> list[ReceivedSpan]:
    return [span for span in receiver.spans if span.name == name]


def test_a_request_is_one_trace_below_its_callers_and_every_parent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch) as tracers:
            [response] = ask(tracers, body())
        assert response.status_code == 200, response.text
        [root] = named(receiver, "text_completion demo")
        assert root.service == "ingress"
        assert root.parent == CALLER
        assert {span.trace for span in receiver.spans} == {TRACE}
        below = [span for span in receiver.spans if span is not root]
        assert {(span.parent, span.service) for span in below} == {(root.id, "router")}
        steps = [span.name for span in below]
        # The prompt fits one step, which gives the first token; five more follow, of which four have a span.
        assert steps == ["queue", "prefill", *["decode"] * 4]
        assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in below)


def test_the_root_says_what_was_asked_and_used_and_never_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch) as tracers:
            [response] = ask(tracers, body())
        [root] = named(receiver, "text_completion demo")
        answer = response.json()
        said = {name.removeprefix("gen_ai."): value for name, value in root.attributes.items()}
        assert said["operation.name"] == "text_completion"
        assert said["request.model"] == "demo"
        assert said["response.id"] == answer["id"]
        assert said["usage.input_tokens"] == answer["usage"]["prompt_tokens"]
        assert said["usage.output_tokens"] == answer["usage"]["completion_tokens"] == 6
        assert said["response.finish_reasons"] == ["length"]
        assert said.keys() == {
            "operation.name", "provider.name", "request.model", "response.model", "response.id", "request.max_tokens",
            "request.temperature", "request.choice.count", "usage.input_tokens", "usage.output_tokens",
            "usage.cache_read.input_tokens", "response.finish_reasons", "expertscale.request_id",
        }  # fmt: skip
        assert said.pop("expertscale.request_id") == response.headers["x-request-id"]
        assert {f"gen_ai.{name}" for name in said} <= CONVENTIONS
        assert said["operation.name"] in {each.value for each in gen_ai_attributes.GenAiOperationNameValues}


def test_traced_requests_of_one_step_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch) as tracers:
            ask(tracers, body(prompt=[5]), body(prompt=[6]))
        first, second = named(receiver, "prefill")
        assert first.parent != second.parent
        assert (first.links, second.links) == ((), (first.id,))
        assert second.attributes["expertscale.step.sequences"] == 2


def test_a_caller_that_does_not_sample_gets_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch, OTEL_TRACES_SAMPLER="parentbased_always_on") as tracers:
            assert ask(tracers, body(), headers=UNSAMPLED)[0].status_code == 200
        assert receiver.spans == []


@pytest.mark.parametrize("share", ["0.0", "1.0"])
def test_the_share_of_requests_without_a_caller_is_as_set(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": share}
    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch, **settings) as tracers:
            ask(tracers, body(), headers={"traceparent": "nonsense"})
        assert len(named(receiver, "text_completion demo")) == float(share)


def test_a_failed_request_has_an_error_without_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: GenerationRequest) -> Iterator[Exception]:
        yield EngineError("quotes a secret")

    async def call(tracer: Any) -> int:
        async with http(make_service(breaks, tracer=tracer)) as client:
            return (await client.post("/v1/completions", json={"model": "demo"} | body(), headers=SAMPLED)).status_code

    with receiving() as receiver:
        with exporting(receiver.endpoint, monkeypatch) as tracers:
            assert asyncio.run(call(tracers[0])) >= 500
        [root] = receiver.spans
        assert root.failed
        assert root.attributes["error.type"] == "EngineError"
        assert b"secret" not in receiver.payload


def test_an_error_that_was_got_over_is_none_of_the_trace() -> None:
    kept = KeptSpans()

    async def call() -> int:
        script = model_of(OLD, NEW, gone=OLD)  # all of it begins anew with the other model
        async with http(make_service(script, tracer=kept.tracer)) as client:
            return (await client.post("/v1/completions", json=TWO, headers=SAMPLED)).status_code

    assert asyncio.run(call()) == 200
    [root] = kept.ended
    assert root.status.is_unset
    assert "error.type" not in (root.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_is_no_error_of_the_trace(stream: bool) -> None:
    kept = KeptSpans()

    def gone(_: GenerationRequest) -> Iterator[TokenChunk | Exception]:
        yield TokenChunk(0, (5,))
        yield ClientGoneError()

    async def call() -> None:
        asked = {"model": "demo", "stream": stream} | body()
        async with http(make_service(gone, tracer=kept.tracer)) as client:
            with suppress(AssertionError):  # httpx misses the end of an answer that nobody was there to get
                await client.post("/v1/completions", json=asked, headers=SAMPLED)

    asyncio.run(call())
    [root] = kept.ended
    assert root.status.is_unset


def test_a_tracer_that_is_broken_costs_no_request() -> None:
    responses = ask([BrokenTracer(), BrokenTracer()], body(), body())
    assert [response.status_code for response in responses] == [200, 200]


def test_an_endpoint_that_is_down_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as gone:
        pass
    with exporting(gone.endpoint, monkeypatch, OTEL_EXPORTER_OTLP_TIMEOUT="1") as tracers:
        responses = ask(tracers, body(), body())
    assert [response.status_code for response in responses] == [200, 200]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
def test_traces_are_off_without_an_endpoint_that_can_be_used(environ: dict[str, str]) -> None:
    assert telemetry.tracer("ingress", {}, environ) is None


def test_a_process_that_leaves_sends_what_it_still_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        receiving() as receiver,
        exporting(
            receiver.endpoint, monkeypatch, OTEL_BSP_SCHEDULE_DELAY="60000", OTEL_TRACES_SAMPLER="always_on"
        ) as tracers,
    ):
        tracers[0].start_span("last").end()
        telemetry.flush(tracers[0])
        assert [span.name for span in receiver.spans] == ["last"]


def test_a_collector_that_hangs_holds_nobody_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_S", 0.01)
    answers = threading.Event()
    processor = SimpleNamespace(force_flush=lambda: answers.wait(30))
    telemetry.flush(cast("Any", SimpleNamespace(span_processor=processor)))
    assert not answers.is_set(), "it was not waited for"
    answers.set()
    telemetry.flush(None)


def test_off_is_the_plain_generation() -> None:
    assert tracing(None, {}, model="demo", id="i", chat=True) is LoggedGeneration


def test_the_first_steps_and_then_some_are_sampled() -> None:
    assert [step for step in range(1, 100) if is_sampled(step)] == [1, 2, 3, 4, 32, 64, 96]

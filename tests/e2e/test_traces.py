"""Completions against the real demo, traced: what the collector gets, and that nobody waits for one that is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.otlp import ReceivedSpan, Receiver, receiving
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

CONFIG = ROOT / "deployments" / "configs" / "demo.yaml"
CALLER = "00f067aa0ba902b7"
TRACES = [f"4bf92f3577b34da6a3ce929d0e0e473{number}" for number in range(3)]
BODY = {"model": "expertscale-demo", "prompt": "def main():", "max_tokens": 6, "temperature": 0}
LAYERS, PER_TOKEN = 4, 2
DECODED = 4
"""Steps with a span: of five, the first four are sampled."""
PARENTS = {
    "queue": {"text_completion expertscale-demo"},
    "prefill": {"text_completion expertscale-demo"},
    "decode": {"text_completion expertscale-demo"},
    "layer": {"prefill", "decode"},
    "scatter": {"layer"},
    "ffn": {"scatter"},
}
SERVICES = {"ffn": "expertscale-experts", "text_completion expertscale-demo": "expertscale-ingress"}


@pytest.fixture(scope="module")
def collector_port() -> int:
    """Where the demo's spans go, whether somebody listens there or not."""
    return free_port()


@pytest.fixture(scope="module")
def server(collector_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    log = tmp_path_factory.mktemp("traces") / "log"
    with serving(launch(CONFIG, port), port, log, environment=environment) as server:
        yield server


def complete(server: Server, trace: str) -> httpx.Response:
    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def whole(receiver: Receiver, trace: str) -> dict[str, ReceivedSpan] | None:
    """All spans of a trace by id, once none is missing; every process sends its own, when it likes."""
    spans = {span.id: span for span in receiver.spans if span.trace == trace}
    names = Counter(span.name for span in spans.values())
    orphans = [span.parent for span in spans.values() if span.parent not in spans]
    complete = (
        orphans == [CALLER]  # the root's
        and names["prefill"] > 0
        and names["decode"] == DECODED
        and names["layer"] == LAYERS * (names["prefill"] + names["decode"])
        and names["ffn"] == names["scatter"] > 0
    )
    return spans if complete else None


def test_a_sampled_completion_is_one_trace_from_the_ingress_to_the_experts(server: Server, collector_port: int) -> None:
    with receiving(collector_port) as receiver:
        answer = complete(server, TRACES[0])
        spans = wait_for(lambda: whole(receiver, TRACES[0]), 30, "all spans of the trace")
        [root] = [span for span in spans.values() if span.parent == CALLER]
        assert root.attributes["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
        for span in spans.values():
            assert span.service == SERVICES.get(span.name, "expertscale-router")
            assert not span.failed
            if span is not root:
                above = spans[span.parent]
                assert above.name in PARENTS[span.name]
                assert above.start_ns <= span.start_ns <= span.end_ns <= above.end_ns
        named = {name: [span for span in spans.values() if span.name == name] for name in PARENTS}
        steps = [*named["prefill"], *named["decode"]]
        assert len(named["decode"]) == DECODED
        assert len(named["layer"]) == LAYERS * len(steps)
        for layer in named["layer"]:
            tokens, rows = (layer.attributes[f"expertscale.{what}"] for what in ("tokens", "rows"))
            sent = [span.attributes["expertscale.rows"] for span in named["scatter"] if span.parent == layer.id]
            assert rows == sum(sent) == PER_TOKEN * tokens
        for ffn in named["ffn"]:
            scatter = spans[ffn.parent]
            for about in ("group", "replica", "rows"):
                assert ffn.attributes[f"expertscale.{about}"] == scatter.attributes[f"expertscale.{about}"]
            assert scatter.attributes["expertscale.transport"] == "stream"
            assert ffn.attributes["expertscale.layer"] == spans[scatter.parent].attributes["expertscale.layer"]
        assert b"def main" not in receiver.payload


def test_a_collector_that_is_gone_loses_spans_and_nothing_else(server: Server, collector_port: int) -> None:
    with receiving(collector_port):
        before = complete(server, TRACES[1]).json()
    after = complete(server, TRACES[1]).json()
    assert after["choices"] == before["choices"]
    assert server.get("/health")
    with receiving(collector_port) as receiver:
        complete(server, TRACES[2])
        wait_for(lambda: whole(receiver, TRACES[2]), 30, "a whole trace, once there is a collector again")

"""One completion against the real demo, traced: what the collector gets, and that nobody waits for one that is gone."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.otlp import receiving
from tests.serving import ROOT, free_port, launch, serving, wait_for

CONFIG = ROOT / "deployments" / "configs" / "demo.yaml"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
BODY = {"model": "expertscale-demo", "prompt": "def main():", "max_tokens": 6, "temperature": 0}


def test_a_sampled_completion_is_one_trace_through_ingress_and_router(tmp_path: Path) -> None:
    port = free_port()
    with receiving() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        with serving(launch(CONFIG, port), port, tmp_path / "log", environment=environment) as server:
            answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=HEADERS, timeout=60)
            assert answer.status_code == 200
            # The ingress's span ends last; the router exports on its own.
            wait_for(lambda: any(span.parent == PARENT for span in receiver.spans), 20, "the root")
            wait_for(lambda: any(span.name == "prefill" for span in receiver.spans), 20, "the router's spans")
            spans = {span.id: span for span in receiver.spans if span.trace == TRACE}
    [root] = [span for span in spans.values() if span.parent == PARENT]
    assert root.service == "expertscale-ingress"
    assert root.attributes["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    others = [span for span in spans.values() if span is not root]
    assert {span.service for span in others} == {"expertscale-router"}
    assert {"queue", "prefill"} <= {span.name for span in others}
    assert all(span.parent in spans for span in others), "every parent has come"
    assert b"def main" not in receiver.payload

"""The demo's metrics where Prometheus finds them, at Ray's endpoint, after requests of known tokens. One server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster import metrics
from cluster.metrics import Metric, Section, sections
from tests.prometheus import (
    PREFIX,
    Sample,
    discovery_file,
    metrics_urls,
    only_ours,
    prometheus,
    promtool,
    samples,
    scraped,
)
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

CONFIG = ROOT / "deployments" / "configs" / "demo.yaml"
REPORT_S = 2
PROMPTS = ("def main():", "The river", "SELECT name FROM", "def main():")
TOKENS = 24
GROUPS = {f"experts-{i}" for i in range(4)}
SEEN_ONLY_IN_TROUBLE = {metrics.START_FAILURES, metrics.GIVEN_UP_STARTS}
BY = {"Ingress replica": "Ingress", "Router replica": "Router", "expert replica": "experts-"}


@dataclass(frozen=True)
class Asked:
    """What was sent: prompt and completion tokens of the answers, and how many requests were answered."""

    prompt_tokens: int
    completion_tokens: int
    answered: int


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("metrics") / "log"
    environment = {"RAY_metrics_report_interval_ms": str(1000 * REPORT_S)}
    with serving(launch(CONFIG, port), port, log, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def asked(server: Server) -> Asked:
    """Completions, a streamed chat, and what is refused."""
    prompt_tokens = completion_tokens = 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for prompt in PROMPTS:
            body = {"model": "expertscale-demo", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
            usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
            assert usage["completion_tokens"] == TOKENS
            prompt_tokens += usage["prompt_tokens"]
            completion_tokens += TOKENS
        for refused, status in (({"max_tokens": -1}, 400), ({"model": "another"}, 404)):
            body = {"model": "expertscale-demo", "prompt": "x"}
            assert client.post("/v1/completions", json=body | refused).status_code == status
        assert client.post("/v1/chat/completions", content=b" " * (5 << 20)).status_code == 413
    return Asked(prompt_tokens, completion_tokens, len(PROMPTS))


@pytest.fixture(scope="module")
def text(server: Server, asked: Asked) -> str:
    """What Ray's endpoint says once all of it has arrived there."""
    [url] = metrics_urls(server)

    def complete() -> str:
        said = scraped(url)
        found = samples(said)
        everything = (
            not absent(found)
            and total(found, metrics.REQUESTS) == asked.answered + 3
            and total(found, metrics.GENERATED_TOKENS) == asked.completion_tokens
            # A level is told once a second, later than the events it may have lasted over.
            and total(found, metrics.OPEN_REQUESTS) == 0
            # Each replica reports in its own time.
            and 0 < total(found, metrics.SENT_ROWS) == total(found, metrics.COMPUTED_ROWS)
        )
        return said if everything else ""

    try:
        return str(wait_for(complete, 30, "all metrics at Ray's endpoint"))
    except AssertionError:
        found = samples(scraped(url))
        requests = [each for each in found if each.name == f"ray_{metrics.REQUESTS.name}" and each.value]
        counts = {m.name: total(found, m) for m in (metrics.GENERATED_TOKENS, metrics.SENT_ROWS, metrics.COMPUTED_ROWS)}
        pytest.fail(f"absent: {absent(found)}; requests: {requests}; {counts}")


def absent(found: list[Sample]) -> set[str]:
    """Names of metrics a healthy run shows that are not there yet."""
    names = {each.name.removesuffix("_bucket") for each in found}
    expected = {m for section, those in sections().items() if section.by in BY for m in those}
    return {m.name for m in expected - SEEN_ONLY_IN_TROUBLE if f"ray_{m.name}" not in names}


def of(found: list[Sample], metric: Metric, **labels: str) -> list[Sample]:
    return [each for each in found if each.name == f"ray_{metric.name}" and each.has(**labels)]


def total(found: list[Sample], metric: Metric, **labels: str) -> float:
    return sum(each.value for each in of(found, metric, **labels))


def test_every_metric_has_the_labels_of_the_table_and_serves_own(text: str) -> None:
    sections_of: dict[str, tuple[Section, Metric]] = {
        f"ray_{metric.name}": (section, metric) for section, those in sections().items() for metric in those
    }
    found = samples(text)
    assert found
    for each in found:
        base = each.name
        for suffix in ("_bucket", "_sum", "_count"):
            if base not in sections_of:
                base = each.name.removesuffix(suffix)
        section, metric = sections_of[base]
        if section.by in BY:
            assert set(each.labels) - {"le"} == {*metric.labels, "application", "deployment", "replica"}
            assert each.labels["deployment"].startswith(BY[section.by])


def test_requests_and_errors_are_those_that_were_sent(text: str, asked: Asked) -> None:
    found = samples(text)
    completions, chat = {"endpoint": "/v1/completions"}, {"endpoint": "/v1/chat/completions"}
    assert total(found, metrics.REQUESTS, outcome="ok", **completions) == asked.answered
    assert total(found, metrics.REQUESTS, outcome="error", **completions) == 2
    assert total(found, metrics.REQUESTS, outcome="error", **chat) == 1
    assert total(found, metrics.REQUEST_ERRORS, code="request", **completions) == 1
    assert total(found, metrics.REQUEST_ERRORS, code="model_not_found", **completions) == 1
    assert total(found, metrics.REQUEST_ERRORS, code="body_too_large", **chat) == 1
    assert total(found, metrics.REQUEST_ERRORS) == 3
    assert total(found, metrics.FINISHED_CHOICES, reason="length") == asked.answered
    assert total(found, metrics.OPEN_REQUESTS) == 0
    for metric in (metrics.REQUEST_S, metrics.FIRST_TOKEN_S, metrics.NEXT_TOKEN_S):
        counts = [each.value for each in found if each.name == f"ray_{metric.name}_count" and each.has(**completions)]
        assert counts == [asked.answered]


def test_a_counter_stands_at_0_before_its_first_event(text: str) -> None:
    found = samples(text)
    assert [each.value for each in of(found, metrics.REQUEST_ERRORS, code="rate_limit")] == [0, 0]
    for metric in (metrics.PREEMPTIONS, metrics.RESENT_BATCHES, metrics.RESUMED_REQUESTS):
        assert [each.value for each in of(found, metric)] == [0]


def test_tokens_rows_and_times_of_the_router_fit_what_was_asked(text: str, asked: Asked) -> None:
    found = samples(text)
    assert total(found, metrics.GENERATED_TOKENS) == asked.completion_tokens
    cached = total(found, metrics.CACHED_TOKENS)
    assert total(found, metrics.PROMPT_TOKENS) + cached == asked.prompt_tokens
    steps = total(found, metrics.STEPS)
    layers = total(found, metrics.SCATTERS) / steps
    assert layers == 4
    assert 0 < total(found, metrics.SCATTER_S) < total(found, metrics.STEP_S)
    assert total(found, metrics.CRITICAL_S) <= total(found, metrics.SCATTER_S)
    # The last token of an answer is sampled and not computed.
    computed = asked.prompt_tokens - cached + asked.completion_tokens - asked.answered
    assert {each.labels["group"] for each in of(found, metrics.SENT_ROWS)} == GROUPS
    assert total(found, metrics.SENT_ROWS) == computed * layers * 2
    assert total(found, metrics.TRANSPORT_BYTES, transport="stream") > 0
    assert total(found, metrics.KV_TOKENS) > total(found, metrics.KV_USED_TOKENS)
    assert [each.value for each in of(found, metrics.VIEW_READY_REPLICAS)] == [1] * len(GROUPS)
    assert total(found, metrics.VIEW_AGE_S) < 10


def test_experts_computed_what_the_router_sent(text: str) -> None:
    found = samples(text)
    for group in GROUPS:
        assert total(found, metrics.COMPUTED_ROWS, group=group) == total(found, metrics.SENT_ROWS, group=group)
        batches = total(found, metrics.BATCHES, group=group, pool="default")
        assert 0 < batches <= total(found, metrics.COMPUTED_ROWS, group=group)
        assert 0 < total(found, metrics.BUSY_S, group=group) < batches
        assert total(found, metrics.CONNECTIONS, group=group) == 1
        assert total(found, metrics.SPEED, group=group) > 100
        for metric in (metrics.BATCH_SIZE, metrics.FFN_S):
            name = f"ray_{metric.name}_count"
            [observed] = [each.value for each in found if each.name == name and each.has(group=group)]
            assert 0 < observed <= batches


def test_nothing_that_clients_say_is_in_a_label(text: str) -> None:
    words = ["another", "cmpl-", *PROMPTS]
    assert [each for each in samples(text) for word in words if word in str(each.labels)] == []


def test_prometheus_finds_no_fault_with_the_names(text: str) -> None:
    assert PREFIX in only_ours(text)
    assert promtool("check", "metrics", stdin=only_ours(text)) == ""


def test_prometheus_finds_the_endpoint_by_rays_file_and_answers_queries(
    server: Server, asked: Asked, tmp_path: Path
) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: ray, file_sd_configs: [{{files: ['{discovery_file(server)}']}}]}}]\n"
    )
    with prometheus(config=config) as running:
        expression = f"sum(ray_{metrics.GENERATED_TOKENS.name})"
        [answer] = wait_for(lambda: running.query(expression), 30, "a scraped sample")
        assert float(answer["value"][1]) >= asked.completion_tokens
        quantile = f"histogram_quantile(0.95, sum by (le) (ray_{metrics.FIRST_TOKEN_S.name}_bucket))"
        [answer] = running.query(quantile)
        assert 0 < float(answer["value"][1]) < 60


def test_a_client_that_goes_away_is_neither_an_error_nor_an_answer(server: Server, text: str) -> None:
    [url] = metrics_urls(server)
    body = {"model": "expertscale-demo", "messages": [{"role": "user", "content": "Tell a story"}], "stream": True}
    before = samples(text)
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body | {"max_tokens": 900}, timeout=60
    ) as answer:
        next(answer.iter_lines())

    def gone() -> bool:
        return total(samples(scraped(url)), metrics.REQUESTS, outcome="client_gone") == 1

    wait_for(gone, 30, "the client that is gone")
    now = samples(scraped(url))
    assert total(now, metrics.REQUEST_ERRORS) == total(before, metrics.REQUEST_ERRORS)
    assert total(now, metrics.REQUESTS, outcome="ok") == total(before, metrics.REQUESTS, outcome="ok")
    wait_for(lambda: total(samples(scraped(url)), metrics.RUNNING) == 0, 30, "nothing runs")

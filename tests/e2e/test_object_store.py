"""configs/object-store.yaml: the same answers, with every batch of rows travelling through Ray's object store."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.conftest import MODEL, WholeModel
from tests.serving import ROOT, Server, free_port, launch, serving, wait_for

PROMPTS = ("import os\nimport sys\n\n", "The program reads", "选项\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    config = ROOT / "deployments" / "configs" / "object-store.yaml"
    with serving(launch(config, port), port, tmp_path_factory.mktemp("object-store") / "log") as server:
        yield server


def test_answers_equal_the_whole_model_and_the_bytes_are_visible(server: Server, whole_model: WholeModel) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model=MODEL, prompt=list(PROMPTS), max_tokens=24, temperature=0)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]
    assert texts == [whole_model.complete(prompt, 24) for prompt in PROMPTS]
    sent = wait_for(lambda: server.get("/v1/cluster")["transport_bytes"]["object_store"], 10, "bytes to be reported")
    # Every row there and back, float32 of width 192, top-2, four layers: at least the prompts and tokens asked for.
    assert sent > 3 * 24 * 4 * 192 * 4
    assert server.get("/v1/cluster")["transport_bytes"]["stream"] == 0

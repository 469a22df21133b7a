"""The page on the running demo: it shows the groups, moves with load, lights up a prompt's experts, outlives a kill."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser import browser, troubles
from tests.chaos.processes import Processes
from tests.serving import ROOT, Server, free_port, launch, serving

DEMO = ROOT / "deployments" / "configs" / "demo.yaml"
APPLICATION = "expertscale"
PATIENCE_MS = 20000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with serving(launch(DEMO, port), port, tmp_path_factory.mktemp("dashboard") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(f"{server.url}/dashboard")
        yield page


def test_the_page_follows_the_demo(server: Server, page: Page, tmp_path: Path) -> None:
    errors = troubles(page)
    groups = server.get("/v1/cluster")["groups"]
    page.reload()
    expect(page.locator("#connection")).to_have_text("live", timeout=PATIENCE_MS)
    expect(page.locator("#groups h3")).to_have_text([group["name"] for group in groups])
    expect(page.locator("#heat-max")).to_have_text("0", timeout=PATIENCE_MS)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#heat")).to_have_attribute("data-lit", re.compile("[1-9]"), timeout=PATIENCE_MS)
    expect(page.locator("#heat-max")).not_to_have_text("0", timeout=PATIENCE_MS)
    expect(page.locator("#prompt-state")).to_have_text("Done", timeout=PATIENCE_MS)
    page.screenshot(path=str(tmp_path / "dashboard.png"), full_page=True)
    assert errors == []


def test_a_killed_replica_is_seen_and_the_page_goes_on(server: Server, page: Page) -> None:
    errors = troubles(page)
    name = server.get("/v1/cluster")["groups"][0]["name"]
    card = page.locator("#groups article").filter(has=page.get_by_role("heading", name=name, exact=True))
    before = card.locator("tbody .id:first-child").all_text_contents()
    pids = Processes(psutil.Process(server.process.pid), APPLICATION).of(name)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    expect(card.locator("tbody .id:first-child")).not_to_have_text(before, timeout=PATIENCE_MS)
    expect(card.locator(".pill.ok")).to_be_visible(timeout=3 * PATIENCE_MS)
    expect(page.locator("#connection")).to_have_text("live")
    assert errors == []

"""The page in a real Chromium against a small server: what it shows, what it survives, who can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import browser, troubles
from tests.deployments.ingress.page_server import PageServer

BAD = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def live(page: Page, server: PageServer) -> None:
    page.goto(server.url)
    expect(page.locator("#connection")).to_have_text("live")


def test_it_shows_the_groups_and_the_rates_and_has_nothing_to_complain_of(page: Page, server: PageServer) -> None:
    errors = troubles(page)
    server.load = 2.0
    live(page, server)
    expect(page.locator("#groups article")).to_have_count(4)
    expect(page.locator("#groups article").first).to_contain_text("1 of 1 ready")
    expect(page.locator("#rates .tile").first).to_contain_text("80")
    expect(page.locator("#rates .tile").last).to_contain_text("–")
    expect(page.locator("#rates .chart .js-line").first).to_have_attribute("d", re.compile("M.*L"))
    expect(page.locator("#decisions li")).to_contain_text("1 → 2")
    assert errors == []


def test_cells_change_when_load_comes(page: Page, server: PageServer) -> None:
    live(page, server)
    expect(page.locator("#heat-max")).to_have_text("0")
    page.evaluate("new Promise(requestAnimationFrame)")
    cold = page.evaluate("document.querySelector('#heat canvas').toDataURL()")
    server.load = 2.0
    expect(page.locator("#heat-max")).to_have_text("46")
    assert page.evaluate("document.querySelector('#heat canvas').toDataURL()") != cold


def test_a_dead_replica_is_shown_with_the_reason(page: Page, server: PageServer) -> None:
    live(page, server)
    expect(page.locator("#missing")).to_be_hidden()
    server.states[2], server.reason = "draining", "its process ended with signal 9"
    expect(page.locator("#missing-list")).to_contain_text("g2 its process ended with signal 9")
    expect(page.locator("#health")).to_have_text("unavailable")
    expect(page.locator("#groups article").nth(2)).to_contain_text("0 of 1 ready")


def test_a_restart_of_the_server_needs_no_reload(page: Page, server: PageServer) -> None:
    live(page, server)
    page.evaluate("window.same = true")
    server.stop()
    expect(page.locator("#connection")).to_contain_text("reconnecting since")
    server.load = 3.0
    server.start()
    expect(page.locator("#connection")).to_have_text("live", timeout=10000)
    expect(page.locator("#heat-max")).to_have_text("69")
    assert page.evaluate("window.same")


def test_a_key_is_asked_for_and_kept_in_this_tab_only(page: Page, server: PageServer) -> None:
    errors = troubles(page, expected="401")
    server.key = "secret"
    page.goto(server.url)
    page.get_by_label("This server asks for a key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert errors == []


def test_data_is_never_read_as_markup(page: Page, server: PageServer) -> None:
    server.node = server.reason = server.word = BAD
    server.states[0] = "draining"
    live(page, server)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#prompt-state")).to_have_text("Done")
    for place in ("#answer", "#decisions", "#missing-list", "#groups"):
        expect(page.locator(place)).to_contain_text(BAD)
    expect(page.locator("#answer img, #decisions img, #missing-list img, #groups img")).to_have_count(0)
    expect(page).to_have_title("ExpertScale")


@pytest.mark.parametrize("template", [True, False], ids=["chat", "without a chat template"])
def test_a_prompt_streams_its_answer_and_lights_up_its_experts(page: Page, server: PageServer, template: bool) -> None:
    server.template = template
    live(page, server)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_have_text("An answer. " * 3, use_inner_text=True)
    expect(page.locator("#heat")).to_have_attribute("data-lit", "4")


def test_an_answer_can_be_stopped(page: Page, server: PageServer) -> None:
    server.words = 1000
    live(page, server)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("An answer.")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#prompt-state")).to_have_text("Stopped")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_arrow_keys_move_a_cursor_that_reads_its_cell(page: Page, server: PageServer) -> None:
    server.load = 1.0
    live(page, server)
    page.locator("#heat").focus()
    expect(page.locator("#cursor")).to_have_text("Layer 1, expert 0, g0: 1 rows/s")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#cursor")).to_have_text("Layer 2, expert 9, g1: 21 rows/s")


def test_a_phone_needs_no_scrolling_to_the_side(page: Page, server: PageServer) -> None:
    server.node = "a-node-with-a-very-long-name." * 4
    server.reason = "x" * 300
    server.states[1] = "draining"
    page.set_viewport_size({"width": 360, "height": 740})
    live(page, server)
    expect(page.locator("#groups article")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_dark_follows_the_system_and_the_button(page: Page, server: PageServer) -> None:
    page.emulate_media(color_scheme="dark")
    live(page, server)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Switch to light colours").click()
    light = page.evaluate(background)
    assert (dark, light) == ("rgb(14, 17, 22)", "rgb(245, 246, 248)")

"""Debian's Chromium without a screen, driven by Playwright: for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a fresh profile until the block ends; skips the test where Chromium is not installed."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        try:
            yield running
        finally:
            running.close()


def troubles(page: Page, expected: str = "\0") -> list[str]:
    """A list that fills with the errors on the page's console, except those whose text holds `expected`."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "console",
        lambda said: found.append(said.text) if said.type == "error" and expected not in said.text else None,
    )
    return found

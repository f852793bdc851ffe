"""Headless Chromium for the page's tests and screenshots, kept offline but for this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = "/usr/bin/chromium"
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def chromium() -> Iterator:
    """A playwright Browser over the system's Chromium.

    Raises FileNotFoundError, with the command that helps, when there is none: a page nobody looked at is not tested.
    """
    if not os.path.exists(CHROMIUM):
        raise FileNotFoundError(f"{CHROMIUM} is not there. Install it: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            yield browser
        finally:
            browser.close()


def ready(page) -> None:
    """Waits until no search runs."""
    page.locator("body:not(.busy) #grid:not([aria-busy])").wait_for(state="attached")


def search(page, words: str) -> None:
    page.locator("#words").fill(words)
    page.locator("#words").press("Enter")
    says(page, "#status", r" in .* ms")
    ready(page)


def says(page, where: str, pattern: str) -> None:
    """Waits until the element's text has the pattern."""
    from playwright.sync_api import expect

    expect(page.locator(where)).to_contain_text(re.compile(pattern), timeout=10_000)


def names(page) -> list[str]:
    return page.locator("#grid .name").all_text_contents()

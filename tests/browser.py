"""A real browser for tests, where there is one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def browser() -> Iterator[object]:
    """Chromium without a window."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no browser: install chromium (Debian: apt-get install chromium) to test report.html in one")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as engine:
        # Containers have no user namespaces for Chromium's own sandbox.
        launched = engine.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()


class Page:
    """A page from a file, with everything noted that a good one does not do."""

    def __init__(self, launched, path: Path, width: int, **options) -> None:
        self.page = launched.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("request", self._requested)
        self.address = path.as_uri()
        self.page.goto(self.address)

    def _requested(self, request) -> None:
        if request.url != self.address and not request.url.startswith("data:"):
            self.faults.append(f"request: {request.url}")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def style(self, selector: str, name: str) -> str:
        return self.page.eval_on_selector(selector, f"element => getComputedStyle(element).{name}")

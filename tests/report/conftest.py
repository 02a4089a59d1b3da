"""A real browser for the pages: `browser` is Chromium, `opened` a page in it, with what went
wrong and what was asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright


@dataclass
class Opened:
    """A page in a tab.

    `errors` are messages of the console, errors of scripts and dialogs; `asked` the addresses
    requested.
    """

    tab: Any
    address: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def fails(self) -> list[str]:
        """All that a page that is whole in itself does not do."""
        return self.errors + [
            url for url in self.asked if url != self.address and not url.startswith("data:")
        ]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    where = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if where is None:
        pytest.skip("Chromium is not installed: run 'make chromium' to test pages in a browser")
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    contexts: list[Any] = []

    def open_page(html: str, width: int = 1200, scheme: str = "light", **how: Any) -> Opened:
        file = tmp_path / f"report-{len(contexts)}.html"
        file.write_text(html, encoding="utf-8")
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, **how
            )
        )
        page = Opened(contexts[-1].new_page(), file.as_uri())
        page.tab.on("console", lambda message: page.errors.append(message.text))
        page.tab.on("pageerror", lambda error: page.errors.append(str(error)))
        page.tab.on("dialog", lambda dialog: page.errors.append(dialog.message))
        page.tab.on("request", lambda request: page.asked.append(request.url))
        page.tab.goto(page.address)
        return page

    yield open_page
    for context in contexts:
        context.close()

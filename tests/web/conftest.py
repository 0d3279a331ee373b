"""A real browser, and a federation on a socket for its page. `make test-web` installs both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import House, LiveServer, listening, open_house

CHROMIUM = os.environ.get("FEDMOE_CHROMIUM") or shutil.which("chromium") or "chromium"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root Chromium has no sandbox to start; the pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors fail the test."""
    context = browser.new_context(locale="en-GB")
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.errors = errors
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[House, LiveServer]]:
    """A federation without tokens."""
    with open_house(tmp_path) as house, listening(house.app) as server:
        yield house, server
        house.app.state.parts.live.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[House, LiveServer]]:
    """A federation with tokens."""
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server:
        yield house, server
        house.app.state.parts.live.close()

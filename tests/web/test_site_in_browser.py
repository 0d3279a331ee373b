"""The site of the documents in a real browser: it is searched offline, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.web

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*\s(?:href|src)=[\"']?((?:https?:)?//[^\"'>\s]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    gather = [sys.executable, str(ROOT / "scripts" / "gather_pages.py"), str(folder / "dist" / "pages")]
    subprocess.run(gather, cwd=ROOT, check=True, timeout=120)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=True, timeout=120)
    return folder / "dist" / "site"


class Files(SimpleHTTPRequestHandler):
    """Serves the site without a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=os.fspath(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_page_names_anything_to_load_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert {page.name: found for page in pages if (found := LOADED.findall(page.read_text()))} == {}


def test_a_search_finds_a_page_and_nothing_is_asked_for_elsewhere(page: Any, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_load_state("networkidle")
    page.keyboard.press("/")
    page.get_by_role("combobox", name="Search").fill("quarantine")
    page.locator("a", has_text="fedmoe quarantine").first.click()
    page.locator("h1", has_text="Commands").wait_for()
    page.goto(f"{url}/docs/faults.html")
    page.wait_for_load_state("networkidle")
    assert [other for other in asked if not other.startswith((url, "blob:", "data:"))] == []

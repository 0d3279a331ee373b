"""The page of runs in a real browser: new records show, texts stay text, two languages, no sideways scroll."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live import listening

from fedmoe.monitor.sample_records import sample_records
from fedmoe.monitor.web.run_pages import RunPages, runs_app

pytestmark = pytest.mark.web


def test_a_run_shows_live_and_as_text(page: Any, tmp_path: Path) -> None:
    records = tmp_path / "metrics.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in sample_records(2, 6, 0, started=0.0)))
    pages = RunPages([tmp_path], lambda run, policy, order: [])
    with listening(runs_app(pages)) as server:
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(server.url.replace("localhost", "127.0.0.1"))
        page.wait_for_selector("#charts .main-svg")
        name = "<img src=x onerror=alert(1)>"
        with records.open("a") as more:
            more.write(json.dumps({"at": 9, "kind": "policy", "policy": name, "iteration": 7, "reward": 1.0}) + "\n")
        page.locator("#runs td", has_text=name).first.wait_for()
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click("#language")
        page.locator("h3", has_text="决策").wait_for()
        page.goto("about:blank")
        pages.stopping = lambda: True

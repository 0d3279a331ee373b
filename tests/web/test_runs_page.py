"""The page of runs in a real browser: new records show, texts stay text, two languages, no sideways scroll."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer, listening

from fedmoe.cli.dashboard import read_filtered
from fedmoe.monitor.sample_records import sample_records
from fedmoe.monitor.web.run_pages import RunPages, runs_app

pytestmark = pytest.mark.web
MARKUP = "<img src=x onerror=alert(1)>"
CHINESE = "/[\\u4e00-\\u9fff]/"


def write_run(folder: Path, policies: int = 2, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    records = sample_records(policies, 40, seed, started=0.0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def episode(iteration: int, reward: float, said: str) -> str:
    turn = {"saw": MARKUP, "said": said, "tokens": 3, "ended": True, "cut": False}
    seat = {"policy": "solver", "version": 1, "team": 0, "strategy": "", "score": 1.0, "valid": 1.0}
    head = {"iteration": iteration, "mode": "cooperative", "episode": 0, "chosen": "drawn", "question": MARKUP}
    return json.dumps(head | {"completed": True, "seats": [seat | {"reward": reward, "turns": [turn]}]}) + "\n"


@contextmanager
def shown(page: Any, *runs: Path) -> Iterator[LiveServer]:
    pages = RunPages(runs, read_filtered)
    with listening(runs_app(pages)) as server:
        page.goto(server.url)
        page.wait_for_selector("#runs td")
        yield server
        page.goto("about:blank")
        pages.live.close()


def test_a_run_shows_live_and_as_text(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    with shown(page, write_run(tmp_path / "run")):
        page.locator("#charts .chart").first.scroll_into_view_if_needed()
        page.wait_for_selector("#charts .main-svg")
        base = {"at": 9, "iteration": 7, "policy": MARKUP}
        lines = [
            base | {"kind": "policy", "reward": 1.0},
            base | {"kind": "decision", "what": MARKUP, "before": "x" * 500, "after": MARKUP, "reason": MARKUP},
            base | {"kind": "evaluation", "opponent": MARKUP, "score": 0.5, "low": 0.4, "high": 0.6, "win_rate": 0.5},
        ]
        with (tmp_path / "run/metrics.jsonl").open("a") as records:
            records.write("".join(json.dumps(line) + "\n" for line in lines))
        page.locator("#runs td", has_text=MARKUP).first.wait_for()
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#runs .decisions").evaluate("box => box.scrollWidth <= box.clientWidth"), "nothing is cut"


def test_everything_on_the_chinese_page_is_in_chinese(page: Any, tmp_path: Path) -> None:
    with shown(page, write_run(tmp_path / "run", policies=3)):
        page.click("#language")
        page.locator("h3", has_text="决策").wait_for()
        for place in range(page.locator("#charts .chart").count()):
            chart = page.locator("#charts .chart").nth(place)
            chart.scroll_into_view_if_needed()
            chart.locator(".main-svg").first.wait_for()
        titles = page.locator("#charts h2, #charts .xtitle, #charts .ytitle, #runs h3, #runs dt, label span")
        texts = [text for text in titles.all_inner_texts() if text and text not in ("KL", "GPU")]
        assert len(texts) > 25
        assert [text for text in texts if not page.evaluate(f"text => {CHINESE}.test(text)", text)] == []
        assert page.evaluate("document.documentElement.lang") == "zh-CN"


def test_the_dark_theme_has_no_white_part_and_bands_that_can_be_told_apart(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    with shown(page, write_run(tmp_path / "run", policies=3)):
        fills = page.evaluate(
            """() => {
            const figures = state.runs[0].figures, colours = [];
            for (const figure of figures) {
              const layout = layoutOf(figure);
              colours.push(...layout.shapes.map((shape) => shape.fillcolor), layout.paper_bgcolor, layout.plot_bgcolor);
              for (const trace of figure.data.map((one) => traceOf(figure, one)))
                colours.push(...(trace.colorscale || []).map(([, colour]) => colour));
            }
            return [...new Set(colours)];
            }"""
        )
        assert not {"#FFFFFF", "#ffffff", "white"} & set(fills)
        bands = [fill for fill in fills if fill.startswith("hsl")]
        assert len(bands) >= 3
        credit = page.locator("#charts h2", has_text="Credit")
        credit.scroll_into_view_if_needed()
        page.locator("#charts .heatmaplayer").first.wait_for()
    context.close()


def test_episodes_are_read_filtered_and_saved(page: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [episode(number, number / 10, f"answer {number} {MARKUP}") for number in range(60)]
    (run / "episodes.jsonl").write_text("".join(rows))
    with shown(page, run):
        page.locator("#episodes summary").first.wait_for()
        assert page.locator("#episodes summary").count() == 50
        assert "59" in page.locator("#episodes summary").first.inner_text()
        page.locator("#episodes summary").first.focus()
        page.keyboard.press("Enter")
        page.locator("#episodes pre", has_text=f"answer 59 {MARKUP}").wait_for()
        page.fill("#least", "0.5")
        page.fill("#most", "0.7")
        page.keyboard.press("Tab")
        page.locator("#episodes summary").nth(3).wait_for(state="detached")
        assert page.locator("#episodes summary").count() == 3
        with page.expect_download() as saved:
            page.click("#save")
        lines = Path(saved.value.path()).read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [5, 6, 7]
        page.select_option("#policy", "checker")
        page.locator("#episodes", has_text="no episode that fits").wait_for()
        assert page.locator("img").count() == 0


def test_many_runs_stand_side_by_side_and_only_charts_in_view_are_drawn(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    runs = [write_run(tmp_path / f"run{number}", 4, number) for number in range(6)]
    with shown(page, *runs, tmp_path):
        rows = page.locator("#compared tbody tr")
        assert rows.count() == 7
        assert rows.nth(6).inner_text().count("there are no records yet") == 1
        page.locator("#charts .chart").first.scroll_into_view_if_needed()
        page.wait_for_selector("#charts .main-svg")
        drawn = page.evaluate("[...document.querySelectorAll('.chart')].filter((box) => box.data).length")
        assert drawn < page.locator("#charts .chart").count() / 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

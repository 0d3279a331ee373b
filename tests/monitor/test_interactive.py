"""The interactive page stands alone: all charts, valid figures, nothing loaded from anywhere (E23)."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import plotly.graph_objects
import pytest
from arena_records import real, series_of, without

from fedmoe.monitor.arena_series import KINDS, ArenaSeries, arena_series
from fedmoe.monitor.interactive.figures import interactive_figures
from fedmoe.monitor.interactive.page import dashboard_page, plotly_library
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import Record

CHARTS = {
    *("reward", "accuracy", "kl", "entropy", "surface", "performance", "radar", "scatter"),
    *("rating", "credit", "team", "decisions", "system", "timing"),
}


class Elements(HTMLParser):
    """Every element with its attributes, and the text of every script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data


def page_of(series: ArenaSeries) -> Elements:
    return Elements(dashboard_page(series, "/* library */"))


def test_a_full_run_shows_every_chart_and_a_surface_to_turn() -> None:
    """E23."""
    figures = {figure.name: figure for figure in interactive_figures(series_of(3, 40))}
    assert set(figures) == CHARTS
    assert figures["surface"].data[0]["type"] == "surface"


@pytest.mark.parametrize(("policies", "iterations"), [(1, 1), (1, 6), (8, 300)])
def test_plotly_accepts_every_figure(policies: int, iterations: int) -> None:
    for figure in interactive_figures(series_of(policies, iterations)):
        assert plotly.graph_objects.Figure({"data": list(figure.data), "layout": figure.layout})


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_kind_leaves_out_its_charts_only(kind: str) -> None:
    gone = {
        "policy": {"reward", "accuracy", "kl", "entropy", "surface", "scatter", "radar"},
        "team": {"team"},
        "credit": {"credit"},
        "rating": {"rating"},
        "evaluation": {"performance"},
        "leader": set[str](),
        "decision": {"decisions"},
        "timing": {"timing"},
        "system": {"system"},
        "run": set[str](),
    }[kind]
    assert {figure.name for figure in interactive_figures(arena_series(without(kind)))} == CHARTS - gone


def test_the_page_loads_nothing() -> None:
    page = page_of(series_of())
    loading = {"src", "srcset", "data", "poster", "action", "href", "background"}
    assert [attributes for _, attributes in page.found if loading & attributes.keys()] == []
    assert not {"link", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.found}
    (policy,) = [
        a["content"] for t, a in page.found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    everything = dashboard_page(series_of(), "")
    assert re.findall(r"https?://|@import|url\(", everything) == []


def test_the_library_is_the_installed_packages() -> None:
    library = plotly_library()
    assert "plotly.js" in library[:200]
    assert "</script" not in library
    assert library in dashboard_page(series_of(), library)


def test_figures_can_be_read_back_from_the_page() -> None:
    library, figures, start = page_of(series_of()).scripts
    assert library.strip() == "/* library */"
    assert {figure["name"] for figure in json.loads(figures)} == CHARTS
    assert "Plotly.newPlot" in start


def test_text_of_records_cannot_become_part_of_the_page() -> None:
    evil = "</script><script>alert(1)</script><img src=x>"
    records: list[Record] = [
        {"at": 1.0, "kind": "run", "task": evil, "policies": evil, "base_model": evil},
        {"at": 1.0, "kind": "policy", "policy": evil, "iteration": 0, "reward": 1.0, "mode": evil},
        {"at": 1.0, "kind": "decision", "policy": evil, "iteration": 0, "what": evil, "reason": evil},
    ]
    page = page_of(arena_series(records))
    assert len(page.scripts) == 3
    assert "img" not in {tag for tag, _ in page.found}


def test_sample_data_is_marked() -> None:
    records = sample_records(2, 6)
    assert "SAMPLE DATA" in dashboard_page(arena_series(records), "")
    assert "SAMPLE DATA" not in dashboard_page(arena_series(real(records)), "")

"""The six charts: right names, right size, no text on other text, sample data marked, missing records said (E15)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from arena_records import real, series_of, without
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from fedmoe.monitor.arena_series import KINDS, ArenaSeries, arena_series
from fedmoe.monitor.charts import CHARTS, arena_pictures
from fedmoe.monitor.charts.dashboard import tiles
from fedmoe.monitor.charts.style import DPI, plain
from fedmoe.monitor.picture import png
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import Record

NAMES = sorted(CHARTS)


@cache
def sample(policies: int, iterations: int) -> ArenaSeries:
    return arena_series(sample_records(policies, iterations))


def words(figure: Figure) -> list[Text]:
    """Every text of a figure, with what stands in it."""
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]


def said(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in words(figure))


def not_drawn(figure: Figure) -> Iterator[Text]:
    """Labels of ticks beyond the limits, and of axes that are switched off: they exist all the same."""
    for axis in figure.findobj(Axis):
        assert isinstance(axis, Axis)
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not axis.axes.axison or not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of horizontal texts whose boxes share more than a sliver, in pixels."""
    figure.draw_without_rendering()
    hidden = set(not_drawn(figure))
    texts = [text for text in words(figure) if text.get_visible() and not text.get_rotation() and text not in hidden]
    # The box of the text itself: that of an annotation holds its line too.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    found = []
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if wide > 4 and high > 4:
            found.append((one, other))
    return found


def test_the_charts_have_the_specified_names() -> None:
    """E15."""
    assert NAMES == [
        "3d_performance_heatmap.png",
        "comprehensive_dashboard.png",
        "model_capability_radar_chart.png",
        "model_performance_bar_chart.png",
        "performance_scatter_plot.png",
        "training_trends_line_chart.png",
    ]


def test_every_chart_is_a_picture_of_the_size_it_was_drawn_for() -> None:
    series = series_of(2, 5)
    for name, data in arena_pictures(series):
        picture = imread(io.BytesIO(data))
        width, height = CHARTS[name](series).get_size_inches()
        assert picture.shape[:2] == pytest.approx((height * DPI, width * DPI), abs=1)
        assert min(picture.shape[:2]) > 400
        assert np.ptp(picture[..., :3]) > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_sample_data_is_marked_and_real_data_is_not(name: str) -> None:
    records = sample_records(2, 8)
    assert "SAMPLE DATA" in said(CHARTS[name](arena_series(records)))
    assert "SAMPLE" not in said(CHARTS[name](arena_series(real(records)))).replace("sample:arithmetic", "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("policies", "iterations"), [(1, 1), (3, 5), (8, 500)])
def test_few_and_many_fit_and_no_text_covers_another(name: str, policies: int, iterations: int) -> None:
    series = sample(policies, iterations)
    figure = CHARTS[name](series)
    assert overlaps(figure) == []
    assert all(policy in said(figure) for policy in series.policies)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_kind_of_record_is_no_trouble(kind: str) -> None:
    series = arena_series(without(kind))
    for draw in CHARTS.values():
        assert words(draw(series))


def test_a_dashboard_of_a_run_without_records_is_drawn() -> None:
    begun = [record for record in sample_records(1, 1) if record["kind"] == "run"]
    figure = CHARTS["comprehensive_dashboard.png"](arena_series(begun))
    figure.draw_without_rendering()
    assert words(figure)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("comprehensive_dashboard.png", "rating", "no ratings recorded"),
        ("comprehensive_dashboard.png", "credit", "no credit recorded"),
        ("comprehensive_dashboard.png", "decision", "no decisions recorded"),
        ("comprehensive_dashboard.png", "system", "no system use recorded"),
        ("training_trends_line_chart.png", "policy", "no reward recorded"),
        ("model_performance_bar_chart.png", "evaluation", "held-out scores were not recorded"),
        ("model_performance_bar_chart.png", "evaluation", "Accuracy at the start and at the end of training"),
        ("model_capability_radar_chart.png", "rating", "not recorded: rating"),
        ("3d_performance_heatmap.png", "policy", "no rewards recorded"),
        ("performance_scatter_plot.png", "policy", "no rewards with efficiency recorded"),
    ],
)
def test_a_chart_says_what_was_not_recorded(name: str, kind: str, text: str) -> None:
    assert text in said(CHARTS[name](arena_series(without(kind))))


def strange() -> ArenaSeries:
    """Names and reasons as long and as odd as they may be, rewards below zero, a policy that ended early."""
    long, records = "p" * 63, list[Record]()
    for i in range(30):
        head: Record = {"at": float(i), "iteration": i, "mode": "my-own mode"}
        for name, reward in ((long, -0.5 + 0.01 * i), ("short", -0.2)):
            if name != "short" or i < 12:
                record = {**head, "kind": "policy", "policy": name, "reward": reward, "tokens": 0, "kl": 0.0}
                records.append(record | {"efficiency_token": reward, "accuracy": 0.5, "entropy": 1.0})
        reason = "$x_1 & <b>\nlonger than any line that there is room for in a dashboard"
        records.append({**head, "kind": "decision", "policy": long, "what": "rank", "before": i, "reason": reason})
    return arena_series(records)


@pytest.mark.parametrize("name", NAMES)
def test_odd_records_are_drawn_without_overlap(name: str) -> None:
    assert overlaps(CHARTS[name](strange())) == []


@pytest.mark.parametrize("name", ["3d_performance_heatmap.png", "performance_scatter_plot.png"])
def test_equal_records_give_equal_pictures(name: str) -> None:
    assert png(CHARTS[name](series_of(2, 6))) == png(CHARTS[name](series_of(2, 6)))


def test_text_of_records_is_one_short_line_and_no_formula() -> None:
    assert plain("a\n b $x$") == r"a b \$x\$"
    assert plain("abcdefghij", 7) == "abc…hij"


@pytest.mark.parametrize(("apart", "number"), [(True, "a"), (False, "not told apart")])
def test_the_dashboard_names_a_best_policy_only_where_it_is_apart(apart: bool, number: str) -> None:
    leader: Record = {"at": 1.0, "kind": "leader", "policy": "a", "rival": "b", "iteration": 3, "apart": apart}
    label, shown, *_ = tiles(arena_series([leader]))[0]
    assert (label, shown) == ("Best policy, held out", number)


def test_without_a_comparison_there_is_no_best_policy() -> None:
    policy: Record = {"at": 1.0, "kind": "policy", "policy": "a", "iteration": 3, "reward": 0.9}
    assert tiles(arena_series([policy]))[0][1] == "–"

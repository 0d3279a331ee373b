"""The gateway's picture: every number is in it, no text lies on other text, and what is uncertain is marked."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from fedmoe.monitor.arena_series import Estimate
from fedmoe.monitor.charts.gateway import GatewayResults, gateway_figure
from fedmoe.monitor.charts.style import DPI
from fedmoe.monitor.picture import png

DOMAINS = ("python", "sql", "man")
MODELS = ("base", "python_expert", "sql_expert", "man_expert", "gateway", "routed")


def results(domains: int = 3, judged: tuple[str, ...] = ("gateway", "routed"), uncertain: int = 0) -> GatewayResults:
    random = np.random.default_rng(0)
    names = DOMAINS[:domains]
    losses = {model: {name: 3.0 - float(random.uniform(0, 0.6)) for name in names} for model in MODELS}
    losses["base"] = dict.fromkeys(names, 3.0)
    kept = {name: {model: Estimate(0.9, 0.8, 1.05) for model in judged} for name in names} if judged else {}
    return GatewayResults(losses, {name: f"{name}_expert" for name in names}, kept, names[:uncertain], "a note")


def said(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts inside the figure whose boxes share more than a sliver, in pixels."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    found = []
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 4 and min(a.y1, b.y1) - max(a.y0, b.y0) > 4:
            found.append((one, other))
    return found


@pytest.mark.parametrize("judged", [(), ("gateway",), ("gateway", "routed"), MODELS[1:]])
@pytest.mark.parametrize("domains", [1, 3])
def test_no_text_lies_on_other_text_or_outside(domains: int, judged: tuple[str, ...]) -> None:
    figure = gateway_figure(results(domains, judged))
    assert overlaps(figure) == []
    width, height = figure.get_size_inches() * DPI
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text().strip() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.x1 <= width, text
            assert box.y0 >= 0, text
            assert box.y1 <= height, text


def test_the_picture_shows_every_loss_and_every_share() -> None:
    shown = results()
    words = said(gateway_figure(shown))
    for model in MODELS:
        assert model in words
        for domain in DOMAINS:
            assert f"{shown.losses[model][domain]:.3f}" in words
    assert words.count("90 %  (80 to 105)") == 6
    assert "a note" in words


def test_an_uncertain_gain_is_marked_and_explained() -> None:
    words = said(gateway_figure(results(uncertain=1)))
    assert "python ?" in words
    assert "?: the own gain may be none" in words
    assert "may be none" not in said(gateway_figure(results()))


def test_without_own_experts_the_right_side_says_so() -> None:
    assert "no domain has an expert of its own" in said(gateway_figure(results(judged=())))


def test_shares_without_a_number_and_wild_ones_are_drawn() -> None:
    shares = {"gateway": Estimate(math.nan, math.nan, math.nan), "routed": Estimate(-0.4, -90.0, 70.0)}
    wild = GatewayResults(results().losses, {}, {"sql": shares}, ("sql",))
    figure = gateway_figure(wild)
    assert "no number" in said(figure)
    assert "−40 %" in said(figure)
    low, high = figure.axes[1].get_xlim()
    assert low < -0.4
    assert high < 3


def test_the_picture_is_a_png_of_its_size_and_the_same_every_time() -> None:
    data = png(gateway_figure(results()))
    picture = imread(io.BytesIO(data))
    width, height = gateway_figure(results()).get_size_inches()
    assert picture.shape[:2] == pytest.approx((height * DPI, width * DPI), abs=1)
    assert np.ptp(picture[..., :3]) > 0.5
    assert data == png(gateway_figure(results()))

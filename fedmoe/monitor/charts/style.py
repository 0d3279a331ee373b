"""Shared style of the charts: headline, sample banner, axes, intervals, labels at the ends of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from fedmoe.monitor.arena_series import ArenaSeries, Estimate
from fedmoe.monitor.charts.label_layout import spread
from fedmoe.monitor.palette import INK, MUTED, SAMPLE_COLOUR, SAMPLE_TEXT, mode_tint, policy_colour, run_line

DPI = 150
_HEAD_INCHES = 0.78
_BANNER_INCHES = 0.34
_FOOT_INCHES = 0.26


@dataclass(frozen=True, slots=True)
class CurveEnd:
    """Where a curve ends (data coordinates) and what is written there."""

    text: str
    colour: str
    x: float
    y: float


def plain(text: str, longest: int = 22) -> str:
    """Text of a record, safe to draw: one line, no formula, cut in the middle when it is long."""
    line = " ".join(text.split())
    if len(line) > longest:
        line = f"{line[: longest - longest // 2 - 1]}…{line[len(line) - longest // 2 :]}"
    return line.replace("$", r"\$")


def new_figure(series: ArenaSeries, title: str, note: str, width: float, height: float, foot: str = "") -> Figure:
    """An empty figure (inches) with a head line, what ran, a foot note, and a banner across the top for sample data."""
    banner = _BANNER_INCHES if series.facts.sample else 0.0
    height += banner
    left, top = 0.16 / width, 1 - banner / height
    bottom = (_FOOT_INCHES + 0.14 * foot.count("\n")) / height if foot else 0.04 / height
    room = (0.08 / width, bottom, 1 - 0.16 / width, top - bottom - _HEAD_INCHES / height)
    engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04, rect=room)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=engine, facecolor="white")
    if banner:
        strip = Rectangle((0, top), 1, 1 - top, transform=figure.transFigure, color=SAMPLE_COLOUR, zorder=5)
        figure.add_artist(strip)
        style = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
        figure.text(0.5, (1 + top) / 2, SAMPLE_TEXT, style, size=11, zorder=6)
    figure.text(left, top - 0.14 / height, title, va="top", size=14, weight="bold", color=INK)
    second = "  ·  ".join(part for part in (run_line(series, plain), note) if part)
    figure.text(left, top - 0.46 / height, second, va="top", size=9, color=MUTED)
    if foot:
        figure.text(left, 0.08 / height, foot, va="bottom", size=8, color=MUTED)
    return figure


def dress(axes: Axes, title: str, x: str = "", y: str = "", grid: Literal["both", "x", "y", ""] = "both") -> None:
    """A panel: its title at the left, labels with units, a light grid behind, no box around."""
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK, pad=8)
    axes.set_xlabel(x, size=9, color=MUTED)
    axes.set_ylabel(y, size=9, color=MUTED)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="#DDE1E6", linewidth=0.8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color("#B8C0CA")


def say_empty(axes: Axes, title: str, text: str) -> None:
    """A panel whose numbers were never recorded says so."""
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK, pad=8)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", size=9, color=MUTED)
    axes.set(xticks=[], yticks=[])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color("#E4E7EB")


def interval_bar(axes: Axes, place: float, height: float, estimate: Estimate, colour: str) -> None:
    """A horizontal bar with the whiskers of its interval, as far as they were recorded."""
    axes.barh(place, estimate.value, height, color=colour)
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        error = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
        axes.errorbar(estimate.value, place, xerr=error, color=INK, linewidth=1.1, capsize=2.5, capthick=1.1)


def policy_rows(axes: Axes, series: ArenaSeries, policies: Sequence[str], names: Sequence[str], size: float) -> None:
    """Name the rows of a panel, each in the colour of its policy."""
    axes.set_yticks(range(len(policies)), names, size=size, weight="bold")
    for label, policy in zip(axes.get_yticklabels(), policies, strict=True):
        label.set_color(policy_colour(series, policy))


def iteration_axis(axes: Axes, series: ArenaSeries) -> None:
    """The x axis of iterations: whole numbers, the run from end to end."""
    first, last = series.iterations
    axes.set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def shade_modes(axes: Axes, series: ArenaSeries) -> None:
    """Tint the iterations by the mode they ran in."""
    for span in series.modes:
        axes.axvspan(span.start, span.end, color=mode_tint(span.mode), linewidth=0, zorder=-10)


def mode_legend(figure: Figure, series: ArenaSeries) -> None:
    """Say in the head of the figure which tint stands for which mode."""
    names = dict.fromkeys(span.mode.partition(":")[0] for span in series.modes)
    if names:
        handles = [Patch(color=mode_tint(name), label=plain(name.replace("_", " "))) for name in names]
        head_legend(figure, series, "mode", handles)


def head_legend(figure: Figure, series: ArenaSeries, title: str, handles: Sequence[Artist]) -> None:
    """A legend in one line at the right of the head, beside the title: the line below may be long."""
    width, height = figure.get_size_inches()
    top = height - (_BANNER_INCHES if series.facts.sample else 0.0)
    legend = figure.legend(
        handles=[Patch(alpha=0, label=title), *handles],
        ncols=len(handles) + 1,
        frameon=False,
        loc="upper right",
        bbox_to_anchor=(1 - 0.1 / width, (top - 0.14) / height),
        fontsize=9,
        borderaxespad=0.0,
        columnspacing=1.3,
        handletextpad=0.5,
        labelcolor=MUTED,
    )
    legend.set_in_layout(False)


def end_labels(axes: Axes, ends: Sequence[CurveEnd], inches: float, size: float = 8.5) -> None:
    """Write every curve's name beside its end, moved apart so that none covers another.

    Set the limits first; `inches` is about the height of the panel.
    """
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    order = sorted((end for end in ends if math.isfinite(end.y)), key=lambda end: end.y)
    places = [(end.y - low) / (high - low) for end in order]
    for end, place in zip(order, spread(places, size * 1.25 / 72 / inches), strict=True):
        axes.annotate(
            *(end.text, (end.x, end.y)),
            xytext=(1.035, place),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            color=end.colour,
            size=size,
            weight="bold",
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
                "alpha": 0.6 if end.x < right else 0.8,
            },
        )


def robust_limits(raw: Sequence[float], shown: Sequence[float]) -> tuple[float, float]:
    """Limits that hold every smoothed value and the middle 98 % of the raw ones, with a margin."""
    values = np.concatenate([np.percentile(raw, [1, 99]) if len(raw) else [], np.asarray(shown, dtype=np.float64)])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    margin = 0.07 * (high - low) or max(abs(high) * 0.1, 0.05)
    return low - margin, high + margin

"""Shared style of the charts: headline, sample banner, axes, intervals, labels at the ends of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from fedmoe.monitor.arena_series import ArenaSeries, Estimate
from fedmoe.monitor.chart_data import Curve
from fedmoe.monitor.palette import INK, MUTED, SAMPLE_COLOUR, SAMPLE_TEXT, mode_tint, policy_colour, run_line

DPI = 150
_HEAD_INCHES = 0.78
_BANNER_INCHES = 0.34
_FOOT_INCHES = 0.26


def plain(text: str, longest: int = 22) -> str:
    """Text of a record, safe to draw: one line, no formula, cut in the middle when it is long."""
    line = " ".join(text.split())
    if len(line) > longest:
        line = f"{line[: longest - longest // 2 - 1]}…{line[len(line) - longest // 2 :]}"
    return line.replace("$", r"\$")


def new_figure(series: ArenaSeries, title: str, note: str, width: float, height: float, foot: str = "") -> Figure:
    """An empty figure for a run: `note` beside what ran, and a banner across the top for sample data."""
    second = "  ·  ".join(part for part in (run_line(series, plain), note) if part)
    return blank_figure(title, second, width, height, foot, series.facts.sample)


def blank_figure(title: str, second: str, width: float, height: float, foot: str, sample: bool = False) -> Figure:
    """An empty figure (inches) with a head line, a second line below it, and a foot note."""
    banner = _BANNER_INCHES if sample else 0.0
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
    axes.spines[:].set_color("#B8C0CA")
    axes.spines[["top", "right", "left"]].set_visible(False)


def say_empty(axes: Axes, title: str, text: str) -> None:
    """A panel whose numbers were never recorded says so."""
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK, pad=8)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", size=9, color=MUTED)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#E4E7EB")


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
        head_legend(figure, [Patch(alpha=0, label="mode"), *handles], series.facts.sample)


def head_legend(figure: Figure, handles: Sequence[Artist], sample: bool = False) -> None:
    """A legend in one line at the right of the head, beside the title: the line below may be long."""
    width, height = figure.get_size_inches()
    top = height - (_BANNER_INCHES if sample else 0.0)
    legend = figure.legend(
        handles=list(handles),
        ncols=len(handles),
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


def end_labels(axes: Axes, curves: Sequence[Curve], inches: float, longest: int = 16) -> None:
    """Write every curve's name beside the end of its smooth line, moved apart so that none covers another.

    Set the limits first; `inches` is about the height of the panel, `longest` the most characters of a name.
    """
    low, high = axes.get_ylim()
    right, size = axes.get_xlim()[1], 8.5
    order = sorted((curve for curve in curves if math.isfinite(curve.smooth[-1])), key=lambda curve: curve.smooth[-1])
    places = [(float(curve.smooth[-1]) - low) / (high - low) for curve in order]
    for curve, place in zip(order, spread(places, size * 1.25 / 72 / inches), strict=True):
        x, y = float(curve.x[-1]), float(curve.smooth[-1])
        line = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            *(plain(curve.name, longest), (x, y)),
            xytext=(1.035, place),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            color=curve.colour,
            size=size,
            weight="bold",
            arrowprops=line | {"color": curve.colour, "alpha": 0.6 if x < right else 0.8},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1] as near as can be to the wanted ones (ascending), `gap` apart where there is room.

    Least squares: values that are too close form a block that is centred on their mean (pool adjacent violators).
    """
    gap = min(gap, 1 / max(len(places) - 1, 1))
    blocks: list[tuple[float, int]] = []
    for index, value in enumerate(places):
        blocks.append((value - index * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (before, many), (mean, count) = blocks[-2:]
            blocks[-2:] = [((before * many + mean * count) / (many + count), many + count)]
    shifts = [mean for mean, count in blocks for _ in range(count)]
    highest = 1 - (len(places) - 1) * gap
    return [min(max(shift, 0.0), highest) + index * gap for index, shift in enumerate(shifts)]

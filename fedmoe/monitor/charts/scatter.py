"""Scatter chart of reward over efficiency: points sized by tokens, lighter where earlier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable
from fedmoe.monitor.charts.label_layout import Box, place_labels
from fedmoe.monitor.charts.style import dress, head_legend, new_figure, plain
from fedmoe.monitor.palette import MUTED, policy_colour, short

_POINTS = 60
#: About the size of the panel.
_INCHES = (10.6, 5.5)


@dataclass(frozen=True, slots=True)
class _Cloud:
    """The points of a policy in order of time, all (n,)."""

    policy: str
    colour: str
    x: Float64Array
    y: Float64Array
    tokens: Float64Array


def performance_scatter(series: ArenaSeries) -> Figure:
    """Points of every policy: efficiency (x), reward (y), tokens (size), lighter where earlier."""
    clouds = [cloud for policy in series.policies if (cloud := _cloud(series, policy)) is not None]
    thinned = any(len(series.tables[cloud.policy].points("reward")[0]) > _POINTS for cloud in clouds)
    foot = "Ring: the last fifth's mean. Line: moving average." + (
        f" Points: means over {_POINTS} equal stretches of the run." if thinned else " Points: one for each iteration."
    )
    figure = new_figure(series, "Efficiency and reward", "lighter: earlier", 11.5, 7.4, foot)
    axes = figure.subplots()
    if not clouds:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no rewards with efficiency recorded", ha="center", color=MUTED, size=11)
        return figure
    dress(axes, "", "efficiency (reward per 1000 tokens)", "mean reward per episode")
    largest = max(float(np.nanmax(cloud.tokens, initial=0.0)) for cloud in clouds)
    for cloud in clouds:
        _draw(axes, cloud, largest)
    _mark_ends(axes, clouds)
    _size_legend(figure, series, largest)
    return figure


def _cloud(series: ArenaSeries, policy: str) -> _Cloud | None:
    table = series.tables[policy]
    both = np.isfinite(table.column("reward")) & np.isfinite(table.column("efficiency_token"))
    if not both.any():
        return None
    columns = [_thinned(table, name, both) for name in ("efficiency_token", "reward", "tokens")]
    return _Cloud(policy, policy_colour(series, policy), *columns)


def _thinned(table: SeriesTable, name: str, rows: np.ndarray) -> Float64Array:
    """Means over equal stretches, the same rows in every column so that points stay points."""
    parts = np.array_split(table.column(name)[rows], min(int(rows.sum()), _POINTS))
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def _areas(tokens: Float64Array, largest: float) -> Float64Array:
    """Areas in square points, in proportion to tokens; a small dot where tokens are not known."""
    counts = np.nan_to_num(tokens, nan=0.0)
    return np.maximum(170 * counts / largest, 8.0) if largest > 0 else np.full(len(counts), 30.0)


def _draw(axes: Axes, cloud: _Cloud, largest: float) -> None:
    fade = np.linspace(0.12, 0.65, len(cloud.x)) if len(cloud.x) > 1 else [0.65]
    colours = [to_rgba(cloud.colour, float(alpha)) for alpha in fade]
    axes.scatter(cloud.x, cloud.y, _areas(cloud.tokens, largest), colours, linewidths=0, zorder=3)
    span = max(1, len(cloud.x) // 10)
    kernel = np.ones(span) / span
    if len(cloud.x) > span + 1:
        path = [np.convolve(values, kernel, "valid") for values in (cloud.x, cloud.y)]
        axes.plot(*path, color=cloud.colour, linewidth=1.2, alpha=0.7, zorder=2)


def _mark_ends(axes: Axes, clouds: Sequence[_Cloud]) -> None:
    """A ring at every policy's end, with its name and numbers close by where they cover least."""
    axes.margins(0.07)
    x_low, x_high, y_low, y_high = *axes.get_xlim(), *axes.get_ylim()
    axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high))
    scale = np.array([_INCHES[0] / (x_high - x_low), _INCHES[1] / (y_high - y_low)])
    corner = np.array([x_low, y_low])
    ends = np.array([_end(cloud) for cloud in clouds])
    points = np.concatenate([np.column_stack([cloud.x, cloud.y]) for cloud in clouds])
    texts = [f"{plain(cloud.policy, 20)}\n{short(y)} at {short(x)}" for cloud, (x, y) in zip(clouds, ends, strict=True)]
    sizes = [(0.082 * max(len(line) for line in text.splitlines()) + 0.06, 0.34) for text in texts]
    anchors = [(float(x), float(y)) for x, y in (ends - corner) * scale]
    boxes = place_labels(anchors, sizes, (points - corner) * scale, Box(0, 0, *_INCHES))
    for cloud, end, text, anchor, box in zip(clouds, ends, texts, anchors, boxes, strict=True):
        axes.scatter([end[0]], [end[1]], 150, "white", edgecolors=cloud.colour, linewidths=2.4, zorder=5)
        middle = np.array([box.left + box.width / 2, box.bottom + box.height / 2]) / scale + corner
        _label(axes, text, cloud.colour, end, middle, box.nearest(anchor))


def _label(
    axes: Axes, text: str, colour: str, end: Float64Array, middle: Float64Array, corner: tuple[float, float]
) -> None:
    """Text around `middle`, joined to `end` by a line from its side or corner (shares of its width and height)."""
    axes.annotate(
        text,
        tuple(end),
        xytext=tuple(middle),
        ha="center",
        va="center",
        color=colour,
        size=9,
        weight="bold",
        linespacing=1.1,
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.12"},
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.9,
            "shrinkA": 0,
            "shrinkB": 7,
            "relpos": corner,
        },
    )


def _end(cloud: _Cloud) -> tuple[float, float]:
    last = max(1, len(cloud.x) // 5)
    return float(cloud.x[-last:].mean()), float(cloud.y[-last:].mean())


def _size_legend(figure: Figure, series: ArenaSeries, largest: float) -> None:
    if largest <= 0:
        return
    handles = [
        Line2D([], [], linestyle="", marker="o", color="#9AA5B1", markersize=float(np.sqrt(170 * share)))
        for share in (0.25, 0.5, 1.0)
    ]
    for handle, share in zip(handles, (0.25, 0.5, 1.0), strict=True):
        handle.set_label(short(largest * share))
    head_legend(figure, series, "tokens per iteration", handles)

"""Scatter chart of reward over efficiency: points sized by tokens, lighter where earlier."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable
from fedmoe.monitor.chart_data import Curve
from fedmoe.monitor.charts.style import dress, end_labels, head_legend, new_figure
from fedmoe.monitor.palette import MUTED, policy_colour, short

_POINTS = 60
#: About the height of the panel.
_INCHES = 5.5


def performance_scatter(series: ArenaSeries) -> Figure:
    """Points of every policy: efficiency (x), reward (y), tokens (size), lighter where earlier."""
    both = {
        policy: np.isfinite(table.column("reward")) & np.isfinite(table.column("efficiency_token"))
        for policy, table in series.tables.items()
    }
    policies = [policy for policy in series.policies if both[policy].any()]
    points = "one for each iteration"
    if any(both[policy].sum() > _POINTS for policy in policies):
        points = f"means over {_POINTS} equal stretches of the run"
    foot = f"Ring: the last fifth's mean. Line: moving average. Points: {points}."
    figure = new_figure(series, "Efficiency and reward", "lighter: earlier", 11.5, 7.4, foot)
    axes = figure.subplots()
    if not policies:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no rewards with efficiency recorded", ha="center", color=MUTED, size=11)
        return figure
    dress(axes, "", "efficiency (reward per 1000 tokens)", "mean reward per episode")
    clouds = {policy: _thinned(series.tables[policy], both[policy]) for policy in policies}
    largest = max(float(np.nanmax(tokens, initial=0.0)) for _, _, tokens in clouds.values())
    for policy, cloud in clouds.items():
        _draw(axes, policy_colour(series, policy), *cloud, largest)
    _mark_ends(axes, series, clouds)
    if largest > 0:
        _size_legend(figure, series, largest)
    return figure


def _thinned(table: SeriesTable, rows: np.ndarray) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Efficiency, reward and tokens (n,): means over equal stretches, the same in each so that points stay points."""
    columns = (table.column(name)[rows] for name in ("efficiency_token", "reward", "tokens"))
    split = (np.array_split(column, min(int(rows.sum()), _POINTS)) for column in columns)
    x, y, tokens = (np.array([np.nan if np.isnan(p).all() else np.nanmean(p) for p in parts]) for parts in split)
    return x, y, tokens


def _draw(axes: Axes, colour: str, x: Float64Array, y: Float64Array, tokens: Float64Array, largest: float) -> None:
    fade = np.linspace(0.12, 0.65, len(x)) if len(x) > 1 else [0.65]
    # Areas in square points, in proportion to tokens; a small dot where tokens are not known.
    counts = np.nan_to_num(tokens, nan=0.0)
    areas = np.maximum(170 * counts / largest, 8.0) if largest > 0 else np.full(len(counts), 30.0)
    axes.scatter(x, y, areas, [to_rgba(colour, float(alpha)) for alpha in fade], linewidths=0, zorder=3)
    span = max(1, len(x) // 10)
    if len(x) > span + 1:
        path = [np.convolve(values, np.ones(span) / span, "valid") for values in (x, y)]
        axes.plot(*path, color=colour, linewidth=1.2, alpha=0.7, zorder=2)


def _mark_ends(
    axes: Axes, series: ArenaSeries, clouds: dict[str, tuple[Float64Array, Float64Array, Float64Array]]
) -> None:
    """A ring at every policy's end, with its name and numbers at the right."""
    ends: list[Curve] = []
    for policy, (x, y, _) in clouds.items():
        last, colour = max(1, len(x) // 5), policy_colour(series, policy)
        place, height = x[-last:].mean(keepdims=True), y[-last:].mean(keepdims=True)
        axes.scatter(place, height, 150, "white", edgecolors=colour, linewidths=2.4, zorder=5)
        name = f"{policy}  {short(float(height[0]))} at {short(float(place[0]))}"
        ends.append(Curve(name, colour, place, height, height))
    axes.margins(0.07)
    end_labels(axes, ends, _INCHES, longest=36)


def _size_legend(figure: Figure, series: ArenaSeries, largest: float) -> None:
    handles = [
        Line2D([], [], ls="", marker="o", color="#9AA5B1", ms=np.sqrt(170 * share), label=short(largest * share))
        for share in (0.25, 0.5, 1.0)
    ]
    title = Patch(alpha=0, label="tokens per iteration")
    head_legend(figure, [title, *handles], series.facts.sample)

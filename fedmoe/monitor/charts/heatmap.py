"""Reward chart over policy and iteration: 3-D bars above the same numbers as a flat heat map."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.chart_data import RewardGrid, reward_grid
from fedmoe.monitor.charts.style import dress, new_figure, plain, policy_rows
from fedmoe.monitor.palette import INK, MUTED, policy_colour

_COLOURS = colormaps["viridis"]
_TITLE = "Reward by policy and iteration"
_BINS = 36
_WIDTH = 12.5
_STAGE_INCHES = 11.0


def performance_landscape(series: ArenaSeries) -> Figure:
    """3-D bars for the shape, a flat heat map with the same colours for reading numbers off."""
    land = reward_grid(series, _BINS)
    if land is None:
        figure = new_figure(series, _TITLE, "", _WIDTH, 7.8)
        figure.text(0.5, 0.5, "no rewards recorded", ha="center", color=MUTED, size=11)
        return figure
    foot = f"Each cell: mean over {land.width:.0f} iterations." if land.width > 1 else ""
    figure = new_figure(series, _TITLE, "", _WIDTH, 7.8 + 0.3 * len(land.policies), foot)
    low = float(np.nanmin(land.values))
    scale = Normalize(low, max(float(np.nanmax(land.values)), low + 1e-9))
    # The stage is placed by hand: what a layout engine measures of a 3-D scene is its box, not what is seen of it.
    flat_inches = 0.3 * len(land.policies)
    grid = figure.add_gridspec(2, 1, height_ratios=(5.8, flat_inches))
    height = float(figure.get_size_inches()[1])
    bottom = (flat_inches + 1.15) / height
    # A 3-D stage is a square; larger than what is seen, since it cuts off what leaves it.
    wide, high = _STAGE_INCHES / _WIDTH, _STAGE_INCHES / height
    middle = bottom + 2.95 / height
    stage = figure.add_axes(
        (0.475 - wide / 2, middle - high / 2, wide, high), projection="3d", computed_zorder=False, facecolor="none"
    )
    _bars(stage, series, land, scale)
    _flat(figure.add_subplot(grid[1, 0]), series, land, scale)
    bar = figure.colorbar(
        ScalarMappable(scale, _COLOURS), cax=figure.add_axes((0.925, bottom + 0.9 / height, 0.012, 3.6 / height))
    )
    bar.set_label("mean reward per episode", size=9, color=MUTED)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED, length=0)
    bar.outline.set_visible(False)
    return figure


def _bars(axes: Axes3D, series: ArenaSeries, land: RewardGrid, scale: Normalize) -> None:
    count = len(land.policies)
    floor = min(0.0, float(np.nanmin(land.values)))
    # Drawn back to front, one policy after the other: bars of one policy stand behind each other from this side.
    for place in reversed(range(count)):
        there = np.isfinite(land.values[place])
        heights = land.values[place][there]
        axes.bar3d(
            *(land.starts[there], np.full(len(heights), place - 0.31), np.full(len(heights), floor)),
            *(land.lengths[there] * 0.92, 0.62, np.maximum(heights - floor, 1e-6)),
            color=_COLOURS(scale(heights)),
            shade=True,
            edgecolor="white",
            linewidth=0.15,
            zorder=10 + count - place,
        )
    _walls(axes, series, land)


def _walls(axes: Axes3D, series: ArenaSeries, land: RewardGrid) -> None:
    count = len(land.policies)
    axes.set_box_aspect((2.6, 0.75 + 0.17 * count, 0.95), zoom=0.82 - 0.01 * count)
    axes.view_init(elev=27, azim=-62)
    axes.set_xlabel("iteration", size=9, color=MUTED, labelpad=14)
    axes.set_zlabel("reward", size=9, color=MUTED, labelpad=4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.zaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_yticks(range(len(land.policies)), [plain(policy, 16) for policy in land.policies])
    axes.tick_params(labelsize=8.5, colors=MUTED)
    axes.tick_params(axis="y", pad=1)
    for label, policy in zip(axes.get_yticklabels(), land.policies, strict=True):
        label.set(ha="left", va="center", weight="bold", color=policy_colour(series, policy))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color="#E0E4E9", linewidth=0.7)


def _flat(axes: Axes, series: ArenaSeries, land: RewardGrid, scale: Normalize) -> None:
    edges: Float64Array = np.append(land.starts, land.starts[-1] + land.lengths[-1])
    rows = np.arange(len(land.policies) + 1) - 0.5
    axes.pcolormesh(
        edges, rows, np.ma.masked_invalid(land.values), norm=scale, cmap=_COLOURS, edgecolor="white", linewidth=0.3
    )
    dress(axes, "The same from above: back row on top", "iteration", grid="")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    policy_rows(axes, series, land.policies, [plain(policy, 20) for policy in land.policies], 9)
    axes.set_ylim(-0.5, len(land.policies) - 0.5)
    for place, policy in enumerate(land.policies):
        last = series.tables[policy].recent("reward")
        axes.text(1.008, place, f"{last:.2f}", transform=axes.get_yaxis_transform(), va="center", size=9, color=INK)
    top = len(land.policies) - 0.4
    axes.text(1.008, top, "last fifth", transform=axes.get_yaxis_transform(), va="bottom", size=8, color=MUTED)

"""Trend chart: reward, accuracy, KL divergence and entropy of every policy over the iterations."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import ArenaSeries, smoothed, smoothing_span
from fedmoe.monitor.charts.style import (
    CurveEnd,
    dress,
    end_labels,
    iteration_axis,
    mode_legend,
    new_figure,
    plain,
    robust_limits,
    say_empty,
    shade_modes,
)
from fedmoe.monitor.palette import MUTED, TREND_PANELS, policy_colour, policy_dash

_MARKERS_UP_TO = 15


def training_trends(series: ArenaSeries) -> Figure:
    """Four panels of curves, raw (thin) and smoothed (bold), modes as shaded bands."""
    span = smoothing_span(series)
    foot = f"Bold: exponential moving average over about {span} iterations. Thin: as recorded."
    figure = new_figure(series, "Training trends", "", 13, 8.2, foot)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, title, unit) in zip(panels.flat, TREND_PANELS, strict=True):
        curves(axes, series, column, title, unit, 2.7)
    for axes in panels[1]:
        axes.set_xlabel("iteration", size=9, color=MUTED)
    mode_legend(figure, series)
    return figure


def curves(axes: Axes, series: ArenaSeries, column: str, title: str, unit: str, inches: float) -> None:
    """One panel: a column of every policy over the iterations, its name at the end of its curve."""
    span = smoothing_span(series)
    points_of = {policy: table.points(column) for policy, table in series.tables.items()}
    points_of = {policy: points for policy, points in points_of.items() if len(points[0])}
    if not points_of:
        say_empty(axes, title, f"no {column} recorded")
        return
    dress(axes, title, y=unit)
    shade_modes(axes, series)
    raw: list[float] = []
    shown: list[float] = []
    ends: list[CurveEnd] = []
    for policy, (x, y) in points_of.items():
        colour, smooth = policy_colour(series, policy), smoothed(y, span)
        marker = "o" if len(x) <= _MARKERS_UP_TO else ""
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3, marker=marker, markersize=3)
        axes.plot(x, smooth, color=colour, linewidth=2.0, linestyle=policy_dash(series, policy))
        raw += y.tolist()
        shown += smooth.tolist()
        ends.append(CurveEnd(plain(policy, 16), colour, float(x[-1]), float(smooth[-1])))
    iteration_axis(axes, series)
    axes.set_ylim(*robust_limits(raw, shown))
    end_labels(axes, ends, inches)

"""The dashboard: the whole run on one page."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import ArenaSeries, smoothing_span, window
from fedmoe.monitor.charts import dashboard_panels as panels
from fedmoe.monitor.charts.style import mode_legend, new_figure, plain
from fedmoe.monitor.charts.trends import curves
from fedmoe.monitor.palette import INK, MUTED, TREND_PANELS, policy_colour, short

_PANEL_INCHES = 2.9


def comprehensive_dashboard(series: ArenaSeries) -> Figure:
    """Key numbers, trends, ratings, credit, team, system, decisions and speed; empty panels say what is missing."""
    foot = f"Bold: exponential moving average over about {smoothing_span(series)} iterations. Thin: as recorded."
    figure = new_figure(series, "Arena dashboard", "", 18.5, 13.2, foot)
    grid = figure.add_gridspec(4, 3, height_ratios=(0.24, 1, 1, 1))
    _tiles(figure.add_subplot(grid[0, :]), series)
    for place, (column, title, unit) in enumerate(TREND_PANELS[:2]):
        axes = figure.add_subplot(grid[1, place])
        curves(axes, series, column, title, unit, _PANEL_INCHES)
        axes.set_xlabel("iteration", size=9, color=MUTED)
    panels.ratings(figure.add_subplot(grid[1, 2]), series, _PANEL_INCHES)
    panels.credit(figure.add_subplot(grid[2, 0]), series)
    panels.team(figure.add_subplot(grid[2, 1]), series, _PANEL_INCHES)
    panels.system(figure.add_subplot(grid[2, 2]), series, _PANEL_INCHES)
    panels.decisions(figure.add_subplot(grid[3, :2]), series)
    panels.speed(figure.add_subplot(grid[3, 2]), series, _PANEL_INCHES)
    mode_legend(figure, series)
    return figure


def _tiles(axes: Axes, series: ArenaSeries) -> None:
    """Key numbers in a row: the label small, the number large, a remark below."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    numbers = tiles(series)
    for place, (label, number, remark, colour) in enumerate(numbers):
        x = place / len(numbers)
        axes.text(x, 0.98, label, va="top", size=9, color=MUTED)
        axes.text(x, 0.42, number, va="center", size=17, weight="bold", color=colour)
        axes.text(x, -0.02, remark, va="bottom", size=8.5, color=MUTED)


def tiles(series: ArenaSeries) -> list[tuple[str, str, str, str]]:
    """Label, number, remark and colour of every key number."""
    rewards = {
        policy: value for policy in series.policies if math.isfinite(value := series.tables[policy].recent("reward"))
    }
    first, last = series.iterations
    tokens = [float(np.nansum(table.column("tokens"))) for table in series.tables.values()]
    updates = [value for table in series.tables.values() if math.isfinite(value := table.last("weight_updates"))]
    seconds = series.timing.points("iteration_seconds")[1]
    return [
        ("Best policy, held out", *_best(series)),
        ("Reward, mean of policies", *_change(series, "reward"), INK),
        ("Accuracy, mean of policies", *_change(series, "accuracy"), INK),
        ("Iterations", f"{last - first + 1:.0f}" if rewards else "–", _duration(float(seconds.sum())), INK),
        ("Tokens", short(sum(tokens)) if any(tokens) else "–", f"{len(series.policies)} policies", INK),
        ("Weight updates", f"{sum(updates):.0f}" if updates else "–", "of all policies", INK),
        ("Decisions", str(len(series.decisions)), "changes made while training", INK),
    ]


def _best(series: ArenaSeries) -> tuple[str, str, str]:
    """A policy's name only where it is surely ahead of every other."""
    leader = series.leader
    if leader is None:
        return "–", "not compared on held-out questions", INK
    lead = f"{leader.lead.value:+.2f} [{leader.lead.low:.2f}, {leader.lead.high:.2f}]"
    if leader.apart:
        return plain(leader.policy, 16), f"{lead} on {plain(leader.rival, 12)}", policy_colour(series, leader.policy)
    return "not told apart", f"{plain(leader.policy, 12)} {lead} on {plain(leader.rival, 12)}", INK


def _change(series: ArenaSeries, column: str) -> tuple[str, str]:
    """The recent mean over policies, and the one of as many iterations at the start."""
    ends = []
    for table in series.tables.values():
        values = table.points(column)[1]
        count = window(len(values))
        if count:
            ends.append((float(values[:count].mean()), float(values[-count:].mean())))
    if not ends:
        return "–", ""
    start, end = (float(value) for value in np.mean(ends, axis=0))
    return f"{end:.2f}", f"{start:.2f} at the start ({end - start:+.2f})"


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"

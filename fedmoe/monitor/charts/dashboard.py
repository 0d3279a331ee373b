"""The dashboard: the whole run on one page."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import ArenaSeries, DecisionPoint, window
from fedmoe.monitor.chart_data import CREDIT_COLOURS, TREND_PANELS, credit_table
from fedmoe.monitor.charts import curves
from fedmoe.monitor.charts.style import (
    dress,
    iteration_axis,
    mode_legend,
    new_figure,
    plain,
    policy_rows,
    say_empty,
    shade_modes,
)
from fedmoe.monitor.palette import INK, MUTED, policy_colour, short

_PANEL_INCHES = 2.9
#: Decisions that are shown in words, and characters of each.
_NEWEST = 9
_CHARACTERS = 56
#: Share of the panel of decisions that the time line takes; the words stand beside it.
_LINE_SHARE = 0.5


def comprehensive_dashboard(series: ArenaSeries) -> Figure:
    """Key numbers, trends, ratings, credit, team, system, decisions and speed; empty panels say what is missing."""
    figure = new_figure(series, "Arena dashboard", "", 18.5, 13.2, curves.foot_note(series))
    grid = figure.add_gridspec(4, 3, height_ratios=(0.24, 1, 1, 1))
    _tiles(figure.add_subplot(grid[0, :]), series)
    for place, (column, title, unit) in enumerate(TREND_PANELS[:2]):
        axes = figure.add_subplot(grid[1, place])
        curves.trend(axes, series, column, title, unit, _PANEL_INCHES)
        axes.set_xlabel("iteration", size=9, color=MUTED)
    curves.ratings(figure.add_subplot(grid[1, 2]), series, _PANEL_INCHES)
    curves.team(figure.add_subplot(grid[2, 1]), series, _PANEL_INCHES)
    curves.system(figure.add_subplot(grid[2, 2]), series, _PANEL_INCHES)
    curves.speed(figure.add_subplot(grid[3, 2]), series, _PANEL_INCHES)
    _credit(figure.add_subplot(grid[2, 0]), series)
    _decisions(figure.add_subplot(grid[3, :2]), series)
    mode_legend(figure, series)
    return figure


_FIRST_TILE = 1.6


def _tiles(axes: Axes, series: ArenaSeries) -> None:
    """Key numbers in a row: the label small, the number large, a remark below."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    numbers = tiles(series)
    for place, (label, number, remark, colour) in enumerate(numbers):
        # The first remark compares two policies, and takes more room than a number.
        x = (place + (_FIRST_TILE - 1 if place else 0)) / (len(numbers) + _FIRST_TILE - 1)
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


def _credit(axes: Axes, series: ArenaSeries) -> None:
    """A table of the recent mean of every part of the credit, coloured by sign and size."""
    title, credit = "Credit, mean of the last fifth", credit_table(series)
    if credit is None:
        say_empty(axes, title, "no credit recorded")
        return
    policies, parts, values = credit
    colours = LinearSegmentedColormap.from_list("credit", CREDIT_COLOURS)
    limit = float(np.nanmax(np.abs(values))) or 1.0
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    dress(axes, title, grid="")
    axes.set_xticks(range(len(parts)), parts, size=9)
    policy_rows(axes, series, policies, [plain(policy, 16) for policy in policies], 9)
    for (row, column), value in np.ndenumerate(values):
        # Adding zero turns a rounded -0.0 into 0.0.
        text = f"{round(float(value), 2) + 0.0:+.2f}" if math.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", size=9, color=INK)
    axes.set_xticks(np.arange(len(parts) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(policies) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines["bottom"].set_visible(False)


def _decisions(axes: Axes, series: ArenaSeries) -> None:
    """Left: a lane for each kind of decision, a mark in the colour of its policy. Right: the newest ones in words."""
    if not series.decisions:
        say_empty(axes, "Decisions", "no decisions recorded")
        return
    dress(axes, "Decisions (black: for the whole run)", "iteration", grid="x")
    axes.spines["bottom"].set_visible(False)
    lanes = list(dict.fromkeys(decision.what for decision in series.decisions))
    axes.set_axis_off()
    line = axes.inset_axes((0.075, 0.0, _LINE_SHARE - 0.075, 1.0))
    dress(line, "", "iteration", grid="x")
    shade_modes(line, series)
    for decision in series.decisions:
        colour = policy_colour(series, decision.policy)
        lane = lanes.index(decision.what)
        line.scatter([decision.iteration], [lane], 90, colour, marker="D", edgecolors="white", linewidths=1, zorder=4)
    for lane in range(len(lanes)):
        line.axhline(lane, color="#C3CAD3", linewidth=1, zorder=1)
    iteration_axis(line, series)
    line.set_yticks(range(len(lanes)), [plain(lane.replace("_", " "), 18) for lane in lanes], size=9, color=INK)
    line.set_ylim(len(lanes) - 0.3, -0.7)
    _words(axes.inset_axes((_LINE_SHARE + 0.02, 0.0, 0.98 - _LINE_SHARE, 1.0)), series)


def _words(axes: Axes, series: ArenaSeries) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(_NEWEST, 0))
    newest = series.decisions[-_NEWEST:][::-1]
    if len(series.decisions) > _NEWEST:
        axes.set_title(f"the newest {_NEWEST} of {len(series.decisions)}", loc="left", size=9, color=MUTED)
    for row, decision in enumerate(newest):
        axes.text(0.05, row + 0.5, f"{decision.iteration:.0f}", ha="right", va="center", size=8.5, color=MUTED)
        name, colour = plain(decision.policy or "run", 11), policy_colour(series, decision.policy)
        axes.text(0.07, row + 0.5, name, va="center", size=8.5, weight="bold", color=colour)
        axes.text(0.28, row + 0.5, _sentence(decision), va="center", size=8.5, color=INK)


def _sentence(decision: DecisionPoint) -> str:
    change = f"{plain(decision.what.replace('_', ' '), 14)}: {plain(decision.before, 13)} → {plain(decision.after, 18)}"
    room = max(_CHARACTERS - len(change), 8)
    return f"{change}  ({plain(decision.reason, room)})" if decision.reason else change

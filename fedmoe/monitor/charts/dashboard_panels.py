"""Panels that only the dashboard has: ratings, credit, team, system, decisions, speed."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from fedmoe.monitor.arena_series import ArenaSeries, DecisionPoint, SeriesTable, smoothed, smoothing_span
from fedmoe.monitor.charts.style import (
    CurveEnd,
    dress,
    end_labels,
    iteration_axis,
    plain,
    policy_rows,
    say_empty,
    shade_modes,
)
from fedmoe.monitor.palette import (
    CREDIT_PARTS,
    INK,
    MUTED,
    POLICY_COLOURS,
    SYSTEM_CURVES,
    TEAM_CURVES,
    policy_colour,
    policy_dash,
)

_DIVERGING = LinearSegmentedColormap.from_list("credit", ("#D98550", "#FFFFFF", "#5B9CCB"))
_GIB = 2.0**30
#: Decisions that are shown in words, and characters of each.
_NEWEST = 9
_CHARACTERS = 56
#: Share of the panel of decisions that the time line takes; the words stand beside it.
_LINE_SHARE = 0.5


def ratings(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Skill ratings with a band of one sigma."""
    tables = {policy: table for policy, table in series.rating.items() if len(table.points("mu")[0])}
    if not tables:
        say_empty(axes, "Rating", "no ratings recorded")
        return
    dress(axes, "Rating (band: one sigma)", "iteration", "rating mu (OpenSkill points)")
    ends = []
    for policy, table in tables.items():
        x, mu = table.points("mu")
        sigma = np.nan_to_num(table.column("sigma")[np.isfinite(table.column("mu"))])
        colour = policy_colour(series, policy)
        axes.fill_between(x, mu - sigma, mu + sigma, color=colour, alpha=0.10, linewidth=0)
        axes.plot(x, mu, color=colour, linewidth=2, linestyle=policy_dash(series, policy))
        ends.append(CurveEnd(plain(policy, 16), colour, float(x[-1]), float(mu[-1])))
    mus = np.concatenate([table.points("mu")[1] for table in tables.values()])
    last = max(table.last("sigma") for table in tables.values())
    margin = max(1.6 * (last if np.isfinite(last) else 0.0), 0.12 * float(np.ptp(mus)), 0.5)
    iteration_axis(axes, series)
    # The wide bands of the first games would flatten everything else.
    axes.set_ylim(float(mus.min()) - margin, float(mus.max()) + margin)
    end_labels(axes, ends, inches)


def credit(axes: Axes, series: ArenaSeries) -> None:
    """A table of the recent mean of every part of the credit, coloured by sign and size."""
    title = "Credit, mean of the last fifth"
    parts = [part for part in CREDIT_PARTS if any(np.isfinite(table.recent(part)) for table in series.credit.values())]
    policies = [policy for policy in series.policies if len(series.credit[policy])]
    if not parts or not policies:
        say_empty(axes, title, "no credit recorded")
        return
    values = np.array([[series.credit[policy].recent(part) for part in parts] for policy in policies])
    limit = float(np.nanmax(np.abs(values))) or 1.0
    axes.imshow(np.ma.masked_invalid(values), cmap=_DIVERGING, norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    dress(axes, title, grid="")
    axes.set_xticks(range(len(parts)), parts, size=9)
    policy_rows(axes, series, policies, [plain(policy, 16) for policy in policies], 9)
    for row, column in np.ndindex(values.shape):
        value = float(values[row, column])
        # Adding zero turns a rounded -0.0 into 0.0.
        text = f"{round(value, 2) + 0.0:+.2f}" if math.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", size=9, color=INK)
    axes.set_xticks(np.arange(len(parts) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(policies) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines["bottom"].set_visible(False)


def team(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Cooperation, completion, utilisation of the compute, team score."""
    shown = [name for name in TEAM_CURVES if len(series.team.points(name)[0])]
    if not shown:
        say_empty(axes, "Team", "no team records")
        return
    dress(axes, "Team", "iteration", "share or score (0 to 1)")
    shade_modes(axes, series)
    ends, everything = [], []
    for (name, label), colour in zip(TEAM_CURVES.items(), POLICY_COLOURS, strict=False):
        if name in shown:
            x, y = series.team.points(name)
            smooth = smoothed(y, smoothing_span(series))
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(x, smooth, color=colour, linewidth=2)
            ends.append(CurveEnd(label, colour, float(x[-1]), float(smooth[-1])))
            everything.append(y)
    iteration_axis(axes, series)
    values = np.concatenate(everything)
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    axes.set_ylim(low - (0.04 if low < 0 else 0.0) * (high - low), high + 0.04 * (high - low))
    end_labels(axes, ends, inches)


def speed(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Seconds of every iteration by what they were spent on."""
    x, total = series.timing.points("iteration_seconds")
    if not len(x):
        say_empty(axes, "Time per iteration", "no timing recorded")
        return
    rate = series.timing.rate("tokens", "iteration_seconds")
    about = f", now {rate:,.0f} tokens per second" if np.isfinite(rate) else ""
    dress(axes, f"Time per iteration{about}", "iteration", "seconds")
    there = np.isfinite(series.timing.column("iteration_seconds"))
    span = smoothing_span(series)
    below = np.zeros(len(x))
    ends = []
    for name, colour in (("rollout", POLICY_COLOURS[5]), ("learn", POLICY_COLOURS[4])):
        part = smoothed(np.nan_to_num(series.timing.column(f"{name}_seconds")[there]), span)
        axes.fill_between(x, below, below + part, color=colour, alpha=0.55, linewidth=0)
        ends.append(CurveEnd(name, colour, float(x[-1]), float(below[-1] + part[-1] / 2)))
        below = below + part
    whole = np.maximum(smoothed(total, span), below)
    axes.fill_between(x, below, whole, color="#9AA5B1", alpha=0.6, linewidth=0)
    ends.append(CurveEnd("other", "#6B7683", float(x[-1]), float((below[-1] + whole[-1]) / 2)))
    iteration_axis(axes, series)
    axes.set_ylim(0, float(whole.max()) * 1.12)
    end_labels(axes, ends, inches)


def system(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Use of CPU, memory, GPU and disk in percent over the time of the run."""
    shown = {name: label for name, label in SYSTEM_CURVES.items() if len(series.system.points(name)[0])}
    if not shown:
        say_empty(axes, "System", "no system use recorded")
        return
    seconds = float(series.system.x[-1])
    unit, scale = ("s", 1.0) if seconds < 180 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)
    dress(axes, _memory_title(series.system), f"time since the start ({unit})", "percent")
    ends = []
    for place, (name, label) in enumerate(shown.items()):
        x, y = series.system.points(name)
        smooth = smoothed(y, min(15.0, len(y) / 8))
        colour = POLICY_COLOURS[place]
        axes.plot(x / scale, y, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(x / scale, smooth, color=colour, linewidth=1.8)
        ends.append(CurveEnd(f"{label} {smooth[-1]:.0f} %", colour, float(x[-1] / scale), float(smooth[-1])))
    axes.set_xlim(0, max(seconds / scale, 1e-3))
    axes.set_ylim(0, 104)
    end_labels(axes, ends, inches)


def _memory_title(system: SeriesTable) -> str:
    own, limit = system.last("process_bytes"), system.last("memory_limit_bytes")
    if not np.isfinite(own):
        return "System"
    of = f" of {limit / _GIB:.0f} GiB allowed" if np.isfinite(limit) else ""
    return f"System, this process {own / _GIB:.1f} GiB{of}"


def decisions(axes: Axes, series: ArenaSeries) -> None:
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
        colour = policy_colour(series, decision.policy) if decision.policy in series.policies else INK
        lane = lanes.index(decision.what)
        line.scatter([decision.iteration], [lane], 90, colour, marker="D", edgecolors="white", linewidths=1, zorder=4)
    for lane in range(len(lanes)):
        line.axhline(lane, color="#C3CAD3", linewidth=1, zorder=1)
    iteration_axis(line, series)
    line.set_yticks(range(len(lanes)), [plain(lane.replace("_", " "), 18) for lane in lanes], size=9, color=INK)
    line.set_ylim(len(lanes) - 0.3, -0.7)
    words = axes.inset_axes((_LINE_SHARE + 0.02, 0.0, 0.98 - _LINE_SHARE, 1.0))
    _words(words, series)


def _words(axes: Axes, series: ArenaSeries) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(_NEWEST, 0))
    newest = series.decisions[-_NEWEST:][::-1]
    if len(series.decisions) > _NEWEST:
        axes.set_title(f"the newest {_NEWEST} of {len(series.decisions)}", loc="left", size=9, color=MUTED)
    for row, decision in enumerate(newest):
        colour = policy_colour(series, decision.policy) if decision.policy in series.policies else INK
        axes.text(0.05, row + 0.5, f"{decision.iteration:.0f}", ha="right", va="center", size=8.5, color=MUTED)
        axes.text(
            0.07, row + 0.5, plain(decision.policy or "run", 11), va="center", size=8.5, weight="bold", color=colour
        )
        axes.text(0.28, row + 0.5, _sentence(decision), va="center", size=8.5, color=INK)


def _sentence(decision: DecisionPoint) -> str:
    change = f"{plain(decision.what.replace('_', ' '), 14)}: {plain(decision.before, 13)} → {plain(decision.after, 18)}"
    room = max(_CHARACTERS - len(change), 8)
    return f"{change}  ({plain(decision.reason, room)})" if decision.reason else change

"""The decisions of a run on a line of time, and the newest ones in words."""

from __future__ import annotations

from matplotlib.axes import Axes

from fedmoe.monitor.arena_series import ArenaSeries, DecisionPoint
from fedmoe.monitor.charts.style import dress, iteration_axis, plain, say_empty, shade_modes
from fedmoe.monitor.palette import INK, MUTED, policy_colour

_LIST = 9
_CHARACTERS = 56
#: Share of the panel that the time line takes; the words stand beside it.
_LINE_SHARE = 0.5


def decision_panel(axes: Axes, series: ArenaSeries) -> None:
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
    axes.set(xlim=(0, 1), ylim=(_LIST, 0))
    newest = series.decisions[-_LIST:][::-1]
    if len(series.decisions) > _LIST:
        axes.set_title(f"the newest {_LIST} of {len(series.decisions)}", loc="left", size=9, color=MUTED)
    for row, decision in enumerate(newest):
        colour = policy_colour(series, decision.policy) if decision.policy in series.policies else INK
        axes.text(0.05, row + 0.5, f"{decision.iteration:.0f}", ha="right", va="center", size=8.5, color=MUTED)
        axes.text(
            0.07, row + 0.5, plain(decision.policy or "run", 11), va="center", size=8.5, weight="bold", color=colour
        )
        axes.text(0.28, row + 0.5, _change(decision), va="center", size=8.5, color=INK)


def _change(decision: DecisionPoint) -> str:
    change = f"{plain(decision.what.replace('_', ' '), 14)}: {plain(decision.before, 13)} → {plain(decision.after, 18)}"
    room = max(_CHARACTERS - len(change), 8)
    return f"{change}  ({plain(decision.reason, room)})" if decision.reason else change

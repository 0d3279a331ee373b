"""Capability chart: a radar of six abilities for each policy, with the other policies behind it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.chart_data import ABILITIES, capabilities, recorded_abilities
from fedmoe.monitor.charts.style import new_figure, plain
from fedmoe.monitor.palette import INK, MUTED, policy_colour

_COLUMNS = 4


def model_capability(series: ArenaSeries) -> Figure:
    """Small radars side by side: shape and rank are seen at a glance, also with eight policies."""
    values = capabilities(series)
    shown = recorded_abilities(values)
    policies = [policy for policy in series.policies if any(math.isfinite(value) for value in values[policy].values())]
    columns = min(_COLUMNS, max(len(policies), 1))
    rows = math.ceil(len(policies) / columns) or 1
    foot = "\n".join(f"{name}: {ABILITIES[name]}" for name in shown) if shown else ""
    missing = [name for name in ABILITIES if name not in shown]
    note = f"not recorded: {', '.join(missing)}" if missing and shown else "grey: the other policies"
    width = max(3.3 * columns, 9.6)
    figure = new_figure(series, "Capability", note, width, 2.95 * rows + 0.95 + 0.16 * len(shown), foot)
    if len(shown) < 3 or not policies:
        figure.text(0.5, 0.5, "fewer than three abilities were recorded", ha="center", color=MUTED, size=11)
        return figure
    panels = figure.subplots(rows, columns, subplot_kw={"projection": "polar"}, squeeze=False).flat
    for axes, policy in zip(panels, policies, strict=False):
        _radar(axes, series, values, policy, shown)
    for axes in list(panels)[len(policies) :]:
        axes.set_axis_off()
    return figure


def _radar(
    axes: PolarAxes, series: ArenaSeries, values: dict[str, dict[str, float]], policy: str, shown: list[str]
) -> None:
    angles = np.linspace(0, 2 * math.pi, len(shown), endpoint=False)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    for other in values:
        if other != policy:
            _outline(axes, angles, [values[other][name] for name in shown], "#C3CAD3", 0.9)
    colour, own = policy_colour(series, policy), [values[policy][name] for name in shown]
    _outline(axes, angles, own, colour, 2.2)
    if all(math.isfinite(value) for value in own):
        axes.fill(angles, own, color=colour, alpha=0.16)
    axes.set_title(plain(policy, 24), size=11, weight="bold", color=colour, pad=16)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [""] * 4)
    axes.grid(color="#E0E4E9", linewidth=0.8)
    axes.spines["polar"].set_color("#C9D0D8")
    axes.set_xticks(angles, [""] * len(shown))
    for angle, name, value in zip(angles, shown, own, strict=True):
        _corner(axes, float(angle), name, value)


def _corner(axes: PolarAxes, angle: float, name: str, value: float) -> None:
    """The name and the value of an ability, outside the circle, turned away from it."""
    side, up = math.sin(angle), math.cos(angle)
    align = "center" if abs(side) < 0.2 else ("left" if side > 0 else "right")
    number = f"{value:.2f}" if math.isfinite(value) else "–"
    text = f"{name}\n{number}" if abs(up) < 0.9 else f"{name} {number}"
    axes.text(angle, 1.09, text, ha=align, va="center", size=8, color=INK, linespacing=1.05)


def _outline(axes: PolarAxes, angles: np.ndarray, values: list[float], colour: str, width: float) -> None:
    """The closed line through all abilities that were measured."""
    there = [index for index, value in enumerate(values) if math.isfinite(value)]
    around = [*there, *there[:1]]
    axes.plot(
        angles[around], [values[index] for index in around], color=colour, linewidth=width, marker="o", markersize=3
    )

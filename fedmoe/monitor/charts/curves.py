"""Panels of curves over the iterations, and the trend chart: reward, accuracy, KL divergence and entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable, smoothing_span
from fedmoe.monitor.chart_data import (
    TREND_PANELS,
    Curve,
    policy_curves,
    rating_curves,
    system_curves,
    team_curves,
    time_layers,
)
from fedmoe.monitor.charts.style import (
    dress,
    end_labels,
    iteration_axis,
    mode_legend,
    new_figure,
    say_empty,
    shade_modes,
)
from fedmoe.monitor.palette import MUTED

_MARKERS_UP_TO = 15
_GIB = 2.0**30


def training_trends(series: ArenaSeries) -> Figure:
    """Four panels of curves, raw (thin) and smoothed (bold), modes as shaded bands."""
    figure = new_figure(series, "Training trends", "", 13, 8.2, foot_note(series))
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, title, unit) in zip(panels.flat, TREND_PANELS, strict=True):
        trend(axes, series, column, title, unit, 2.7)
    for axes in panels[1]:
        axes.set_xlabel("iteration", size=9, color=MUTED)
    mode_legend(figure, series)
    return figure


def foot_note(series: ArenaSeries) -> str:
    """What thin and bold curves are."""
    return f"Bold: exponential moving average over about {smoothing_span(series)} iterations. Thin: as recorded."


def trend(axes: Axes, series: ArenaSeries, column: str, title: str, unit: str, inches: float) -> None:
    """A column of every policy over the iterations, its name at the end of its curve."""
    curves = policy_curves(series, series.tables, column)
    if not curves:
        say_empty(axes, title, f"no {column} recorded")
        return
    dress(axes, title, y=unit)
    shade_modes(axes, series)
    _draw(axes, curves)
    iteration_axis(axes, series)
    # Every smoothed value and the middle 98 % of the raw ones, with a margin.
    raw = np.percentile(np.concatenate([curve.y for curve in curves]), [1, 99])
    shown = np.concatenate([raw, *(curve.smooth for curve in curves)])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.07 * (high - low) or max(abs(high) * 0.1, 0.05)
    axes.set_ylim(low - margin, high + margin)
    end_labels(axes, curves, inches)


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        marker = "o" if len(curve.x) <= _MARKERS_UP_TO else ""
        axes.plot(curve.x, curve.y, color=curve.colour, linewidth=0.8, alpha=0.3, marker=marker, markersize=3)
        axes.plot(curve.x, curve.smooth, color=curve.colour, linewidth=2.0, linestyle=curve.dash)


def ratings(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Skill ratings with a band of one sigma."""
    rated = rating_curves(series)
    if not rated:
        say_empty(axes, "Rating", "no ratings recorded")
        return
    dress(axes, "Rating (band: one sigma)", "iteration", "rating mu (OpenSkill points)")
    for curve, sigma in rated:
        axes.fill_between(curve.x, curve.y - sigma, curve.y + sigma, color=curve.colour, alpha=0.10, linewidth=0)
        axes.plot(curve.x, curve.y, color=curve.colour, linewidth=2, linestyle=curve.dash)
    mus = np.concatenate([curve.y for curve, _ in rated])
    margin = max(1.6 * max(float(sigma[-1]) for _, sigma in rated), 0.12 * float(np.ptp(mus)), 0.5)
    iteration_axis(axes, series)
    # The wide bands of the first games would flatten everything else.
    axes.set_ylim(float(mus.min()) - margin, float(mus.max()) + margin)
    end_labels(axes, [replace(curve, smooth=curve.y) for curve, _ in rated], inches)


def team(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Cooperation, completion, utilisation of the compute, team score."""
    curves = team_curves(series)
    if not curves:
        say_empty(axes, "Team", "no team records")
        return
    dress(axes, "Team", "iteration", "share or score (0 to 1)")
    shade_modes(axes, series)
    _draw(axes, curves)
    iteration_axis(axes, series)
    values = np.concatenate([curve.y for curve in curves])
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    axes.set_ylim(low - (0.04 if low < 0 else 0.0) * (high - low), high + 0.04 * (high - low))
    end_labels(axes, curves, inches)


def speed(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Seconds of every iteration by what they were spent on."""
    layers = time_layers(series)
    if not layers:
        say_empty(axes, "Time per iteration", "no timing recorded")
        return
    rate = series.timing.rate("tokens", "iteration_seconds")
    about = f", now {rate:,.0f} tokens per second" if np.isfinite(rate) else ""
    dress(axes, f"Time per iteration{about}", "iteration", "seconds")
    for layer in layers:
        axes.fill_between(layer.x, layer.y, layer.smooth, color=layer.colour, alpha=0.55, linewidth=0)
    iteration_axis(axes, series)
    axes.set_ylim(0, float(layers[-1].smooth.max()) * 1.12)
    end_labels(axes, [replace(layer, smooth=(layer.y + layer.smooth) / 2) for layer in layers], inches)


def system(axes: Axes, series: ArenaSeries, inches: float) -> None:
    """Use of CPU, memory, GPU and disk in percent over the time of the run."""
    curves = system_curves(series)
    if not curves:
        say_empty(axes, "System", "no system use recorded")
        return
    seconds = float(series.system.x[-1])
    unit, scale = ("s", 1.0) if seconds < 180 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)
    dress(axes, _memory_title(series.system), f"time since the start ({unit})", "percent")
    curves = [replace(c, x=c.x / scale, name=f"{c.name} {c.smooth[-1]:.0f} %") for c in curves]
    _draw(axes, curves)
    axes.set_xlim(0, max(seconds / scale, 1e-3))
    axes.set_ylim(0, 104)
    end_labels(axes, curves, inches)


def _memory_title(system: SeriesTable) -> str:
    own, limit = system.last("process_bytes"), system.last("memory_limit_bytes")
    if not np.isfinite(own):
        return "System"
    of = f" of {limit / _GIB:.0f} GiB allowed" if np.isfinite(limit) else ""
    return f"System, this process {own / _GIB:.1f} GiB{of}"

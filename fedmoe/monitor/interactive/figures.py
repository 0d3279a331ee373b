"""All interactive charts of a run, in the order of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable
from fedmoe.monitor.capability import capabilities, present_axes
from fedmoe.monitor.interactive.parts import (
    InteractiveFigure,
    PlotlyJson,
    axis,
    curve,
    layout,
    mode_shapes,
    numbers,
    raw_and_smooth,
)
from fedmoe.monitor.palette import INK, POLICY_COLOURS, faded, policy_colour
from fedmoe.monitor.reward_grid import reward_grid

_TRENDS = (
    ("reward", "Reward", "mean reward per episode"),
    ("accuracy", "Accuracy", "mean seat score (0 to 1)"),
    ("kl", "Movement since sampling", "KL divergence (nats per token)"),
    ("entropy", "Entropy", "entropy (nats per token)"),
)
_TEAM = ("team_score", "completion", "utilisation", "cooperation")
_SYSTEM = {"cpu_percent": "CPU", "memory_percent": "memory", "gpu_percent": "GPU", "disk_percent": "disk"}
_CREDIT = ("shared", "individual", "difference", "versus")
_BINS = 60


def interactive_figures(series: ArenaSeries) -> list[InteractiveFigure]:
    """Every chart that something was recorded for; empty ones are left out."""
    made = [*_trends(series), *(make(series) for make in _OTHERS)]
    return [figure for figure in made if figure.data]


def _trends(series: ArenaSeries) -> Iterator[InteractiveFigure]:
    for column, title, unit in _TRENDS:
        data: list[PlotlyJson] = []
        for policy, table in series.tables.items():
            if len(table.points(column)[0]):
                data += raw_and_smooth(series, table.points(column), policy, policy_colour(series, policy))
        yield InteractiveFigure(column, title, data, layout("iteration", unit, mode_shapes(series)))


def _surface(series: ArenaSeries) -> InteractiveFigure:
    """The landscape of rewards: turn it with the mouse."""
    land = reward_grid(series, _BINS)
    places = list(range(1, len(land.policies) + 1))
    middles = numbers(land.starts + land.lengths / 2)
    surface: PlotlyJson = {
        "type": "surface",
        "x": middles,
        "y": places,
        "z": [numbers(row) for row in land.values],
        "customdata": [[policy] * len(middles) for policy in land.policies],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "reward"}, "thickness": 14},
        "contours": {"y": {"show": True, "color": "#FFFFFF", "width": 2}},
        "hovertemplate": "%{customdata}<br>iteration %{x:.0f}<br>reward %{z:.3f}<extra></extra>",
    }
    # A surface needs two rows; one policy is a ribbon.
    if len(places) == 1:
        names = list(land.policies) * len(middles)
        surface |= {"y": [0.5, 1.5], "z": [numbers(land.values[0])] * 2, "customdata": [names] * 2}
    frame = layout("", "") | {"scene": _scene(land.policies), "height": 560}
    data = [surface] if len(middles) > 1 else []
    title = "Reward by policy and iteration (turn it with the mouse)"
    return InteractiveFigure("surface", title, data, frame, wide=True)


def _scene(policies: Sequence[str]) -> PlotlyJson:
    """The stage of the surface: its axes, its shape, where it is seen from at first."""
    places = list(range(1, len(policies) + 1))
    return {
        "xaxis": axis("iteration"),
        "yaxis": axis("") | {"tickvals": places, "ticktext": list(policies), "range": [0.5, len(policies) + 0.5]},
        "zaxis": axis("reward"),
        "aspectmode": "manual",
        "aspectratio": {"x": 1.9, "y": 1.1, "z": 0.8},
        "camera": {"eye": {"x": 1.25, "y": -2.1, "z": 0.95}, "center": {"x": 0, "y": 0, "z": -0.2}},
    }


def _scatter(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    tokens = [float(np.nanmax(table.column("tokens"), initial=0.0)) for table in series.tables.values()]
    largest = max(tokens, default=0.0)
    for policy, table in series.tables.items():
        there = np.isfinite(table.column("reward")) & np.isfinite(table.column("efficiency_token"))
        paid = np.nan_to_num(table.column("tokens")[there])
        sizes = 4 + 12 * np.sqrt(paid / largest) if largest > 0 else np.full(len(paid), 8.0)
        if there.any():
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": policy,
                    "x": numbers(table.column("efficiency_token")[there]),
                    "y": numbers(table.column("reward")[there]),
                    "customdata": [list(pair) for pair in zip(numbers(table.x[there]), numbers(paid), strict=True)],
                    "marker": {"size": numbers(sizes), "color": policy_colour(series, policy), "opacity": 0.45},
                    "hovertemplate": "iteration %{customdata[0]:.0f}<br>reward %{y:.3f}<br>"
                    "%{x:.4f} per 1000 tokens<br>%{customdata[1]:,.0f} tokens",
                }
            )
    frame = layout("efficiency (reward per 1000 tokens)", "mean reward per episode") | {"hovermode": "closest"}
    return InteractiveFigure("scatter", "Efficiency and reward (size: tokens)", data, frame)


def _radar(series: ArenaSeries) -> InteractiveFigure:
    values = capabilities(series)
    shown = present_axes(values)
    data: list[PlotlyJson] = []
    for policy, found in values.items():
        colour = policy_colour(series, policy)
        data.append(
            {
                "type": "scatterpolar",
                "name": policy,
                "r": [found[name] if math.isfinite(found[name]) else None for name in [*shown, *shown[:1]]],
                "theta": [*shown, *shown[:1]],
                "fill": "toself",
                "fillcolor": faded(colour, 0.08),
                "line": {"color": colour, "width": 2.4},
                "hovertemplate": "%{theta} %{r:.2f}",
            }
        )
    frame = layout("", "") | {"polar": {"radialaxis": {"range": [0, 1], "gridcolor": "#E4E7EB"}, "bgcolor": "#FFFFFF"}}
    frame["margin"] = {"l": 60, "r": 60, "t": 40, "b": 40}
    return InteractiveFigure("radar", "Capability", data if len(shown) > 2 else [], frame)


def _bars(series: ArenaSeries) -> InteractiveFigure:
    final = [found for found in series.final_evaluations() if math.isfinite(found.score.value)]
    several = len({found.opponent for found in final}) > 1
    data: list[PlotlyJson] = []
    for name, colours in (("base model", "#B8C0CA"), ("trained", [policy_colour(series, f.policy) for f in final])):
        intervals = [found.base if name == "base model" else found.score for found in final]
        above = np.array([interval.high - interval.value for interval in intervals])
        below = np.array([interval.value - interval.low for interval in intervals])
        data.append(
            {
                "type": "bar",
                "name": name,
                "x": [f"{f.policy} – {f.opponent}" if several else f.policy for f in final],
                "y": numbers(np.array([interval.value for interval in intervals])),
                "marker": {"color": colours},
                "error_y": {"type": "data", "array": numbers(above), "arrayminus": numbers(below), "color": INK},
                "customdata": numbers(np.array([found.win.value for found in final])),
                "hovertemplate": "%{y:.3f}<br>win rate %{customdata:.2f}",
            }
        )
    frame = layout("", "held-out score (0 to 1)") | {"barmode": "group", "hovermode": "closest"}
    frame["legend"] = {"orientation": "h", "yanchor": "bottom", "y": 1.0}
    return InteractiveFigure("performance", "Final performance against the base model", data if final else [], frame)


def _ratings(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    for policy, table in series.rating.items():
        x, mu = table.points("mu")
        if not len(x):
            continue
        sigma = np.nan_to_num(table.column("sigma")[np.isfinite(table.column("mu"))])
        colour = policy_colour(series, policy)
        band = curve(np.concatenate([x, x[::-1]]), np.concatenate([mu + sigma, (mu - sigma)[::-1]]), policy, colour)
        band |= {"fill": "toself", "fillcolor": faded(colour, 0.1), "showlegend": False, "hoverinfo": "skip"}
        band["line"] = {"width": 0}
        data += [band, curve(x, mu, policy, colour)]
    frame = layout("iteration", "rating mu (OpenSkill points)")
    return InteractiveFigure("rating", "Rating (band: one sigma)", data, frame)


def _credit(series: ArenaSeries) -> InteractiveFigure:
    policies = [policy for policy in series.policies if len(series.credit[policy])]
    values = [[series.credit[policy].recent(part) for part in _CREDIT] for policy in policies]
    finite = [abs(value) for row in values for value in row if math.isfinite(value)]
    trace: PlotlyJson = {
        "type": "heatmap",
        "x": list(_CREDIT),
        "y": policies,
        "z": [numbers(np.array(row)) for row in values],
        "texttemplate": "%{z:+.2f}",
        "colorscale": [[0, "#D98550"], [0.5, "#FFFFFF"], [1, "#5B9CCB"]],
        "zmin": -max(finite, default=1.0),
        "zmax": max(finite, default=1.0),
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }
    frame = layout("", "") | {"yaxis": axis("") | {"autorange": "reversed"}, "hovermode": "closest"}
    return InteractiveFigure("credit", "Credit, mean of the last fifth", [trace] if finite else [], frame)


def _team(series: ArenaSeries) -> InteractiveFigure:
    data = _lines(series, series.team, {name: name.replace("_", " ") for name in _TEAM})
    frame = layout("iteration", "share or score (0 to 1)", mode_shapes(series))
    return InteractiveFigure("team", "Team", data, frame)


def _system(series: ArenaSeries) -> InteractiveFigure:
    frame = layout("seconds since the start", "percent")
    return InteractiveFigure("system", "System", _lines(series, series.system, _SYSTEM), frame)


def _lines(series: ArenaSeries, table: SeriesTable, names: dict[str, str]) -> list[PlotlyJson]:
    data: list[PlotlyJson] = []
    for (column, name), colour in zip(names.items(), POLICY_COLOURS, strict=False):
        if len(table.points(column)[0]):
            data += raw_and_smooth(series, table.points(column), name, colour)
    return data


def _speed(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    for name, colour in (("rollout", POLICY_COLOURS[5]), ("learn", POLICY_COLOURS[4])):
        x, y = series.timing.points(f"{name}_seconds")
        if len(x):
            data.append(curve(x, y, name, colour) | {"stackgroup": "time", "line": {"width": 0, "color": colour}})
    return InteractiveFigure("timing", "Time per iteration", data, layout("iteration", "seconds"))


def _decisions(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    for policy in dict.fromkeys(decision.policy for decision in series.decisions):
        found = [decision for decision in series.decisions if decision.policy == policy]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": policy or "whole run",
                "x": [decision.iteration for decision in found],
                "y": [decision.what.replace("_", " ") for decision in found],
                "text": [f"{d.before} → {d.after}<br>{d.reason}" for d in found],
                "marker": {
                    "size": 13,
                    "symbol": "diamond",
                    "color": policy_colour(series, policy) if policy in series.policies else INK,
                },
                "hovertemplate": "iteration %{x:.0f}<br>%{text}",
            }
        )
    frame = layout("iteration", "", mode_shapes(series)) | {"hovermode": "closest"}
    return InteractiveFigure("decisions", "Decisions", data, frame)


_OTHERS: tuple[Callable[[ArenaSeries], InteractiveFigure], ...] = (
    *(_surface, _bars, _radar, _scatter, _ratings, _credit),
    *(_team, _decisions, _system, _speed),
)

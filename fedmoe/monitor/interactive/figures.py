"""Interactive charts of a run, in the order of the page; a figure is Plotly's JSON, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable, smoothed, smoothing_span
from fedmoe.monitor.capability import capabilities, present_axes
from fedmoe.monitor.palette import (
    CREDIT_PARTS,
    INK,
    MUTED,
    POLICY_COLOURS,
    SYSTEM_CURVES,
    TEAM_CURVES,
    TREND_PANELS,
    faded,
    mode_tint,
    policy_colour,
)
from fedmoe.monitor.reward_grid import reward_grid

PlotlyJson = dict[str, object]
#: A curve's name, its points (x, y), its colour.
_Curve = tuple[str, tuple[Float64Array, Float64Array], str]
_DECIMALS = 6
_BINS = 60


@dataclass(frozen=True, slots=True)
class InteractiveFigure:
    """One chart of the page: Plotly's traces and layout. `wide` ones take the whole width."""

    name: str
    title: str
    data: Sequence[PlotlyJson]
    layout: PlotlyJson
    wide: bool = False


def interactive_figures(series: ArenaSeries) -> list[InteractiveFigure]:
    """Every chart that something was recorded for; empty ones are left out."""
    made = [*_trends(series), *(make(series) for make in _OTHERS)]
    return [figure for figure in made if figure.data]


def _trends(series: ArenaSeries) -> Iterator[InteractiveFigure]:
    for column, title, unit in TREND_PANELS:
        curves = [
            (policy, table.points(column), policy_colour(series, policy)) for policy, table in series.tables.items()
        ]
        yield InteractiveFigure(column, title, _lines(series, curves), _layout("iteration", unit, _mode_shapes(series)))


def _surface(series: ArenaSeries) -> InteractiveFigure:
    """The landscape of rewards: turn it with the mouse."""
    land = reward_grid(series, _BINS)
    places = list(range(1, len(land.policies) + 1))
    middles = _numbers(land.starts + land.lengths / 2)
    surface: PlotlyJson = {
        "type": "surface",
        "x": middles,
        "y": places,
        "z": [_numbers(row) for row in land.values],
        "customdata": [[policy] * len(middles) for policy in land.policies],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "reward"}, "thickness": 14},
        "contours": {"y": {"show": True, "color": "#FFFFFF", "width": 2}},
        "hovertemplate": "%{customdata}<br>iteration %{x:.0f}<br>reward %{z:.3f}<extra></extra>",
    }
    # A surface needs two rows; one policy is a ribbon.
    if len(places) == 1:
        names = list(land.policies) * len(middles)
        surface |= {"y": [0.5, 1.5], "z": [_numbers(land.values[0])] * 2, "customdata": [names] * 2}
    frame = _layout("", "") | {"scene": _scene(land.policies), "height": 560}
    data = [surface] if len(middles) > 1 else []
    title = "Reward by policy and iteration (turn it with the mouse)"
    return InteractiveFigure("surface", title, data, frame, wide=True)


def _scene(policies: Sequence[str]) -> PlotlyJson:
    """The stage of the surface: its axes, its shape, where it is seen from at first."""
    places = list(range(1, len(policies) + 1))
    return {
        "xaxis": _axis("iteration"),
        "yaxis": _axis("") | {"tickvals": places, "ticktext": list(policies), "range": [0.5, len(policies) + 0.5]},
        "zaxis": _axis("reward"),
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
                    "x": _numbers(table.column("efficiency_token")[there]),
                    "y": _numbers(table.column("reward")[there]),
                    "customdata": [list(pair) for pair in zip(_numbers(table.x[there]), _numbers(paid), strict=True)],
                    "marker": {"size": _numbers(sizes), "color": policy_colour(series, policy), "opacity": 0.45},
                    "hovertemplate": "iteration %{customdata[0]:.0f}<br>reward %{y:.3f}<br>"
                    "%{x:.4f} per 1000 tokens<br>%{customdata[1]:,.0f} tokens",
                }
            )
    frame = _layout("efficiency (reward per 1000 tokens)", "mean reward per episode") | {"hovermode": "closest"}
    return InteractiveFigure("scatter", "Efficiency and reward (size: tokens)", data, frame)


def _radar(series: ArenaSeries) -> InteractiveFigure:
    values = capabilities(series)
    shown = present_axes(values)
    around = [*shown, *shown[:1]]
    data: list[PlotlyJson] = [
        {
            "type": "scatterpolar",
            "name": policy,
            "r": [abilities[name] if math.isfinite(abilities[name]) else None for name in around],
            "theta": around,
            "fill": "toself",
            "fillcolor": faded(policy_colour(series, policy), 0.08),
            "line": {"color": policy_colour(series, policy), "width": 2.4},
            "hovertemplate": "%{theta} %{r:.2f}",
        }
        for policy, abilities in values.items()
    ]
    frame = _layout("", "") | {"polar": {"radialaxis": {"range": [0, 1], "gridcolor": "#E4E7EB"}, "bgcolor": "#FFFFFF"}}
    frame["margin"] = {"l": 60, "r": 60, "t": 40, "b": 40}
    return InteractiveFigure("radar", "Capability", data if len(shown) > 2 else [], frame)


def _bars(series: ArenaSeries) -> InteractiveFigure:
    final = [point for point in series.final_evaluations() if math.isfinite(point.score.value)]
    several = len({point.opponent for point in final}) > 1
    data: list[PlotlyJson] = []
    for name, colours in (("base model", "#B8C0CA"), ("trained", [policy_colour(series, f.policy) for f in final])):
        estimates = [point.base if name == "base model" else point.score for point in final]
        above = np.array([estimate.high - estimate.value for estimate in estimates])
        below = np.array([estimate.value - estimate.low for estimate in estimates])
        data.append(
            {
                "type": "bar",
                "name": name,
                "x": [f"{f.policy} – {f.opponent}" if several else f.policy for f in final],
                "y": _numbers(np.array([estimate.value for estimate in estimates])),
                "marker": {"color": colours},
                "error_y": {"type": "data", "array": _numbers(above), "arrayminus": _numbers(below), "color": INK},
                "customdata": _numbers(np.array([point.win.value for point in final])),
                "hovertemplate": "%{y:.3f}<br>win rate %{customdata:.2f}",
            }
        )
    frame = _layout("", "held-out score (0 to 1)") | {"barmode": "group", "hovermode": "closest"}
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
        band = _curve(np.concatenate([x, x[::-1]]), np.concatenate([mu + sigma, (mu - sigma)[::-1]]), policy, colour)
        band |= {"fill": "toself", "fillcolor": faded(colour, 0.1), "showlegend": False, "hoverinfo": "skip"}
        band["line"] = {"width": 0}
        data += [band, _curve(x, mu, policy, colour)]
    frame = _layout("iteration", "rating mu (OpenSkill points)")
    return InteractiveFigure("rating", "Rating (band: one sigma)", data, frame)


def _credit(series: ArenaSeries) -> InteractiveFigure:
    policies = [policy for policy in series.policies if len(series.credit[policy])]
    values = [[series.credit[policy].recent(part) for part in CREDIT_PARTS] for policy in policies]
    finite = [abs(value) for row in values for value in row if math.isfinite(value)]
    trace: PlotlyJson = {
        "type": "heatmap",
        "x": list(CREDIT_PARTS),
        "y": policies,
        "z": [_numbers(np.array(row)) for row in values],
        "texttemplate": "%{z:+.2f}",
        "colorscale": [[0, "#D98550"], [0.5, "#FFFFFF"], [1, "#5B9CCB"]],
        "zmin": -max(finite, default=1.0),
        "zmax": max(finite, default=1.0),
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }
    frame = _layout("", "") | {"yaxis": _axis("") | {"autorange": "reversed"}, "hovermode": "closest"}
    return InteractiveFigure("credit", "Credit, mean of the last fifth", [trace] if finite else [], frame)


def _team(series: ArenaSeries) -> InteractiveFigure:
    frame = _layout("iteration", "share or score (0 to 1)", _mode_shapes(series))
    return InteractiveFigure("team", "Team", _lines(series, _columns(series.team, TEAM_CURVES)), frame)


def _system(series: ArenaSeries) -> InteractiveFigure:
    frame = _layout("seconds since the start", "percent")
    return InteractiveFigure("system", "System", _lines(series, _columns(series.system, SYSTEM_CURVES)), frame)


def _speed(series: ArenaSeries) -> InteractiveFigure:
    parts = [("rollout", POLICY_COLOURS[5]), ("learn", POLICY_COLOURS[4])]
    points = [(name, series.timing.points(f"{name}_seconds"), colour) for name, colour in parts]
    data = [
        _curve(*xy, name, colour) | {"stackgroup": "time", "line": {"width": 0, "color": colour}}
        for name, xy, colour in points
        if len(xy[0])
    ]
    return InteractiveFigure("timing", "Time per iteration", data, _layout("iteration", "seconds"))


def _decisions(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    for policy in dict.fromkeys(decision.policy for decision in series.decisions):
        decisions = [decision for decision in series.decisions if decision.policy == policy]
        colour = policy_colour(series, policy) if policy in series.policies else INK
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": policy or "whole run",
                "x": [decision.iteration for decision in decisions],
                "y": [decision.what.replace("_", " ") for decision in decisions],
                "text": [f"{d.before} → {d.after}<br>{d.reason}" for d in decisions],
                "marker": {"size": 13, "symbol": "diamond", "color": colour},
                "hovertemplate": "iteration %{x:.0f}<br>%{text}",
            }
        )
    frame = _layout("iteration", "", _mode_shapes(series)) | {"hovermode": "closest"}
    return InteractiveFigure("decisions", "Decisions", data, frame)


def _numbers(values: Float64Array) -> list[float | None]:
    """For JSON: rounded, null where there is no number."""
    return [round(float(value), _DECIMALS) if math.isfinite(value) else None for value in values]


def _axis(title: str) -> PlotlyJson:
    """An axis with a title, drawn lightly."""
    return {"title": {"text": title}, "gridcolor": "#E4E7EB", "zeroline": False, "color": MUTED}


def _layout(x: str, y: str, shapes: Sequence[PlotlyJson] = ()) -> PlotlyJson:
    """A plane chart with titled axes; the legend below, the values of all curves shown together."""
    return {
        "xaxis": _axis(x) | {"automargin": True},
        "yaxis": _axis(y) | {"automargin": True},
        "shapes": list(shapes),
        "height": 360,
        "hovermode": "x unified",
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.22},
        "margin": {"l": 60, "r": 20, "t": 10, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "plot_bgcolor": "#FFFFFF",
        "paper_bgcolor": "#FFFFFF",
    }


def _mode_shapes(series: ArenaSeries) -> list[PlotlyJson]:
    """Tinted stretches behind the curves, each with its mode written at its foot."""
    place = {"type": "rect", "layer": "below", "xref": "x", "yref": "paper"}
    label = {"textposition": "bottom left", "font": {"size": 9, "color": MUTED}}
    return [
        {
            **place,
            "x0": span.start,
            "x1": span.end,
            "y0": 0,
            "y1": 1,
            "fillcolor": mode_tint(span.mode),
            "line": {"width": 0},
            "label": {"text": span.mode.replace("_", " "), **label},
        }
        for span in series.modes
    ]


def _curve(x: Float64Array, y: Float64Array, name: str, colour: str) -> PlotlyJson:
    """A line without points."""
    line = {"color": colour, "width": 2.4, "dash": "solid"}
    places = {"x": _numbers(x), "y": _numbers(y)}
    return {"type": "scatter", "mode": "lines", "name": name, "legendgroup": name, **places, "line": line}


def _columns(table: SeriesTable, names: Mapping[str, str]) -> Iterator[_Curve]:
    for (column, name), colour in zip(names.items(), POLICY_COLOURS, strict=False):
        yield name, table.points(column), colour


def _lines(series: ArenaSeries, curves: Iterable[_Curve]) -> list[PlotlyJson]:
    """The numbers as recorded, thin and silent, and their moving average; curves without numbers are left out."""
    span, data = smoothing_span(series), list[PlotlyJson]()
    for name, (x, y), colour in curves:
        if len(x):
            silent: PlotlyJson = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
            thin = _curve(x, y, name, colour) | silent | {"line": {"color": colour, "width": 1}}
            data += [thin, _curve(x, smoothed(y, span), name, colour)]
    return data


_OTHERS: tuple[Callable[[ArenaSeries], InteractiveFigure], ...] = (
    *(_surface, _bars, _radar, _scatter, _ratings, _credit),
    *(_team, _decisions, _system, _speed),
)

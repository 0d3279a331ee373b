"""Interactive charts of a run, in the order of the page; a figure is Plotly's JSON, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.chart_data import (
    CREDIT_COLOURS,
    TREND_PANELS,
    Curve,
    capabilities,
    credit_table,
    policy_curves,
    rating_curves,
    recorded_abilities,
    reward_grid,
    system_curves,
    team_curves,
    time_layers,
)
from fedmoe.monitor.palette import INK, MUTED, faded, mode_tint, policy_colour

PlotlyJson = dict[str, object]
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
        layout = _layout("iteration", unit, _mode_shapes(series))
        yield InteractiveFigure(column, title, _lines(policy_curves(series, series.tables, column)), layout)


def _surface(series: ArenaSeries) -> InteractiveFigure:
    """The landscape of rewards: turn it with the mouse."""
    land, data = reward_grid(series, _BINS), list[PlotlyJson]()
    policies = [] if land is None else list(land.policies)
    if land is not None and len(land.starts) > 1:
        # A surface needs two rows; one policy is a ribbon.
        ribbon = len(policies) == 1
        surface: PlotlyJson = {
            "type": "surface",
            "x": _numbers(land.starts + land.lengths / 2),
            "y": [0.5, 1.5] if ribbon else list(range(1, len(policies) + 1)),
            "z": [_numbers(row) for row in land.values] * (1 + ribbon),
            "customdata": [[policy] * len(land.starts) for policy in policies] * (1 + ribbon),
            "colorscale": "Viridis",
            "colorbar": {"title": {"text": "reward"}, "thickness": 14},
            "contours": {"y": {"show": True, "color": "#FFFFFF", "width": 2}},
            "hovertemplate": "%{customdata}<br>iteration %{x:.0f}<br>reward %{z:.3f}<extra></extra>",
        }
        data.append(surface)
    rows = {"tickvals": list(range(1, len(policies) + 1)), "ticktext": policies}
    scene = {
        "xaxis": _axis("iteration"),
        "yaxis": _axis("") | rows | {"range": [0.5, len(policies) + 0.5]},
        "zaxis": _axis("reward"),
        "aspectmode": "manual",
        "aspectratio": {"x": 1.9, "y": 1.1, "z": 0.8},
        # Where it is seen from at first.
        "camera": {"eye": {"x": 1.25, "y": -2.1, "z": 0.95}, "center": {"x": 0, "y": 0, "z": -0.2}},
    }
    frame, title = _layout("", ""), "Reward by policy and iteration (turn it with the mouse)"
    return InteractiveFigure("surface", title, data, frame | {"scene": scene, "height": 560}, wide=True)


def _scatter(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    tokens = [float(np.nanmax(table.column("tokens"), initial=0.0)) for table in series.tables.values()]
    largest = max(tokens, default=0.0)
    for policy, table in series.tables.items():
        there = np.isfinite(table.column("reward")) & np.isfinite(table.column("efficiency_token"))
        paid = np.nan_to_num(table.column("tokens")[there])
        sizes = 4 + 12 * np.sqrt(paid / largest) if largest > 0 else np.full(len(paid), 8.0)
        if there.any():
            points = [list(pair) for pair in zip(_numbers(table.x[there]), _numbers(paid), strict=True)]
            marker = {"size": _numbers(sizes), "color": policy_colour(series, policy), "opacity": 0.45}
            x, y = (_numbers(table.column(name)[there]) for name in ("efficiency_token", "reward"))
            hover = "reward %{y:.3f}<br>%{x:.4f} per 1000 tokens<br>%{customdata[1]:,.0f} tokens"
            marks = _marks(policy, x, y, marker, "iteration %{customdata[0]:.0f}<br>" + hover)
            data.append(marks | {"customdata": points})
    frame = _layout("efficiency (reward per 1000 tokens)", "mean reward per episode") | {"hovermode": "closest"}
    return InteractiveFigure("scatter", "Efficiency and reward (size: tokens)", data, frame)


def _radar(series: ArenaSeries) -> InteractiveFigure:
    values = capabilities(series)
    shown = recorded_abilities(values)
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
    for curve, sigma in rating_curves(series):
        x, around = curve.x, np.concatenate([curve.y + sigma, (curve.y - sigma)[::-1]])
        band = _line(curve, np.concatenate([x, x[::-1]]), around, width=0)
        band |= {"fill": "toself", "fillcolor": faded(curve.colour, 0.1), "showlegend": False, "hoverinfo": "skip"}
        data += [band, _line(curve, x, curve.y)]
    frame = _layout("iteration", "rating mu (OpenSkill points)")
    return InteractiveFigure("rating", "Rating (band: one sigma)", data, frame)


def _credit(series: ArenaSeries) -> InteractiveFigure:
    credit, data = credit_table(series), list[PlotlyJson]()
    if credit is not None:
        policies, parts, values = credit
        limit = float(np.nanmax(np.abs(values)))
        trace: PlotlyJson = {
            "type": "heatmap",
            "x": parts,
            "y": policies,
            "z": [_numbers(row) for row in values],
            "texttemplate": "%{z:+.2f}",
            "colorscale": [[place, colour] for place, colour in zip((0, 0.5, 1), CREDIT_COLOURS, strict=True)],
        }
        data.append(trace | {"zmin": -limit, "zmax": limit, "showscale": False, "xgap": 2, "ygap": 2})
    frame = _layout("", "") | {"yaxis": _axis("") | {"autorange": "reversed"}, "hovermode": "closest"}
    return InteractiveFigure("credit", "Credit, mean of the last fifth", data, frame)


def _team(series: ArenaSeries) -> InteractiveFigure:
    frame = _layout("iteration", "share or score (0 to 1)", _mode_shapes(series))
    return InteractiveFigure("team", "Team", _lines(team_curves(series)), frame)


def _system(series: ArenaSeries) -> InteractiveFigure:
    frame = _layout("seconds since the start", "percent")
    return InteractiveFigure("system", "System", _lines(system_curves(series)), frame)


def _speed(series: ArenaSeries) -> InteractiveFigure:
    layers = [_line(layer, layer.x, layer.smooth - layer.y, width=0) for layer in time_layers(series)]
    data = [layer | {"stackgroup": "time"} for layer in layers]
    return InteractiveFigure("timing", "Time per iteration", data, _layout("iteration", "seconds"))


def _decisions(series: ArenaSeries) -> InteractiveFigure:
    data: list[PlotlyJson] = []
    for policy in dict.fromkeys(decision.policy for decision in series.decisions):
        decisions = [decision for decision in series.decisions if decision.policy == policy]
        x, y = [d.iteration for d in decisions], [d.what.replace("_", " ") for d in decisions]
        marker = {"size": 13, "symbol": "diamond", "color": policy_colour(series, policy)}
        marks = _marks(policy or "whole run", x, y, marker, "iteration %{x:.0f}<br>%{text}")
        data.append(marks | {"text": [f"{d.before} → {d.after}<br>{d.reason}" for d in decisions]})
    frame = _layout("iteration", "", _mode_shapes(series)) | {"hovermode": "closest"}
    return InteractiveFigure("decisions", "Decisions", data, frame)


def _marks(name: str, x: Sequence[object], y: Sequence[object], marker: PlotlyJson, hover: str) -> PlotlyJson:
    """Points without a line."""
    places = {"x": list(x), "y": list(y)}
    return {"type": "scatter", "mode": "markers", "name": name, **places, "marker": marker, "hovertemplate": hover}


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
    place = {"type": "rect", "layer": "below", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
    label = {"textposition": "bottom left", "font": {"size": 9, "color": MUTED}}
    return [
        {
            **place,
            "x0": span.start,
            "x1": span.end,
            "fillcolor": mode_tint(span.mode),
            "label": {"text": span.mode.replace("_", " "), **label},
        }
        for span in series.modes
    ]


def _line(curve: Curve, x: Float64Array, y: Float64Array, width: float = 2.4) -> PlotlyJson:
    """A line without points, named and coloured as the curve."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": curve.name,
        "legendgroup": curve.name,
        "x": _numbers(x),
        "y": _numbers(y),
        "line": {"color": curve.colour, "width": width, "dash": "solid"},
    }


def _lines(curves: Iterable[Curve]) -> list[PlotlyJson]:
    """The numbers as recorded, thin and silent, and their moving average."""
    silent: PlotlyJson = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    pairs = [(_line(c, c.x, c.y, width=1) | silent, _line(c, c.x, c.smooth)) for c in curves]
    return [line for pair in pairs for line in pair]


_OTHERS: tuple[Callable[[ArenaSeries], InteractiveFigure], ...] = (
    *(_surface, _bars, _radar, _scatter, _ratings, _credit),
    *(_team, _decisions, _system, _speed),
)

"""What all interactive figures are made of. A figure is Plotly's JSON, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, smoothed, smoothing_span
from fedmoe.monitor.palette import INK, MUTED, mode_tint

PlotlyJson = dict[str, object]
_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class InteractiveFigure:
    """One chart of the page: Plotly's traces and layout. `wide` ones take the whole width."""

    name: str
    title: str
    data: Sequence[PlotlyJson]
    layout: PlotlyJson
    wide: bool = False


def numbers(values: Float64Array) -> list[float | None]:
    """For JSON: rounded, null where there is no number."""
    return [round(float(value), _DECIMALS) if math.isfinite(value) else None for value in values]


def axis(title: str) -> PlotlyJson:
    """An axis with a title, drawn lightly."""
    return {"title": {"text": title}, "gridcolor": "#E4E7EB", "zeroline": False, "color": MUTED}


def layout(x: str, y: str, shapes: Sequence[PlotlyJson] = ()) -> PlotlyJson:
    """A plane chart with titled axes; the legend below, the values of all curves shown together."""
    return {
        "xaxis": axis(x) | {"automargin": True},
        "yaxis": axis(y) | {"automargin": True},
        "shapes": list(shapes),
        "height": 360,
        "hovermode": "x unified",
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.22},
        "margin": {"l": 60, "r": 20, "t": 10, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "plot_bgcolor": "#FFFFFF",
        "paper_bgcolor": "#FFFFFF",
    }


def mode_shapes(series: ArenaSeries) -> list[PlotlyJson]:
    """Tinted stretches behind the curves, each with its mode written at its foot."""
    return [
        {
            "type": "rect",
            "layer": "below",
            "xref": "x",
            "yref": "paper",
            "x0": span.start,
            "x1": span.end,
            "y0": 0,
            "y1": 1,
            "fillcolor": mode_tint(span.mode),
            "line": {"width": 0},
            "label": {
                "text": span.mode.replace("_", " "),
                "textposition": "bottom left",
                "font": {"size": 9, "color": MUTED},
            },
        }
        for span in series.modes
    ]


def curve(x: Float64Array, y: Float64Array, name: str, colour: str, dash: str = "solid") -> PlotlyJson:
    """A line without points."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "legendgroup": name,
        "x": numbers(x),
        "y": numbers(y),
        "line": {"color": colour, "width": 2.4, "dash": dash},
    }


def raw_and_smooth(
    series: ArenaSeries, points: tuple[Float64Array, Float64Array], name: str, colour: str
) -> list[PlotlyJson]:
    """The numbers as recorded, thin and silent, and their moving average."""
    x, y = points
    thin = curve(x, y, name, colour) | {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    thin["line"] = {"color": colour, "width": 1}
    return [thin, curve(x, smoothed(y, smoothing_span(series)), name, colour)]

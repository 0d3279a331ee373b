"""Figure of runs for a paper: a panel a measure, one legend, text that stays text in SVG and PDF."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedmoe.monitor.charts.style import DPI, dress, plain
from fedmoe.monitor.palette import POLICY_COLOURS, SAMPLE_COLOUR, SAMPLE_TEXT
from fedmoe.monitor.plot_series import MEASURES, PlotCurve, RunKind

_DASHES = ("-", "--", ":", "-.")
_LONGEST_NAME = 48
_MARKERS_UP_TO = 30
# Of the legend's text.
_CHARACTERS_PER_INCH = 13


def run_figure(kind: RunKind, curves: Sequence[PlotCurve], sample: bool = False) -> Figure:
    """A panel for every measure there is; a colour a series, a kind of line a run; `sample` data are marked as such.

    Every curve is a group of the SVG whose id begins with `curve-`.
    """
    measures = [measure for measure in MEASURES if any(curve.measure == measure for curve in curves)]
    keys = list(dict.fromkeys((curve.run, curve.name) for curve in curves))
    runs, names = (list(dict.fromkeys(values)) for values in zip(*keys, strict=True))
    styles = {(run, name): _style(runs.index(run), names.index(name)) for run, name in keys}
    columns = min(2, len(measures))
    lines = -(-len(measures) // columns)
    figure = Figure(figsize=(4.6 * columns + 0.2, 3.1 * lines + 0.4), dpi=DPI, layout="constrained", facecolor="white")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    axis, scale = _axis(kind, curves)
    for axes, measure in zip(panels, measures, strict=False):
        title, unit = MEASURES[measure]
        own = [curve for curve in curves if curve.measure == measure]
        opponents = {curve.against for curve in own if curve.against}
        against = f" against {plain(', '.join(sorted(opponents)), _LONGEST_NAME)}" if opponents else ""
        dress(axes, title + against, axis, unit)
        for number, curve in enumerate(own):
            _draw(axes, curve, styles[curve.run, curve.name], scale, f"curve-{measure}-{number}")
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    handles = []
    for run, name in keys:
        colour, dash = styles[run, name]
        label = plain(f"{run}: {name}" if len(runs) > 1 else name, _LONGEST_NAME)
        handles.append(Line2D([], [], color=colour, linestyle=dash, label=label))
    _legend(figure, handles)
    if sample:
        figure.suptitle(SAMPLE_TEXT, size=9, weight="bold", color=SAMPLE_COLOUR, wrap=True)
    return figure


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend below all panels, in as many columns as its names leave room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    room = int(figure.get_figwidth() * _CHARACTERS_PER_INCH / (longest + 8))
    ncols = min(len(handles), max(1, room))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def _style(run: int, name: int) -> tuple[str, str]:
    """Colour and kind of line of the series of this number in the run of that one."""
    dash = (run + name // len(POLICY_COLOURS)) % len(_DASHES)
    return POLICY_COLOURS[name % len(POLICY_COLOURS)], _DASHES[dash]


def _axis(kind: RunKind, curves: Sequence[PlotCurve]) -> tuple[str, float]:
    """The x axis in words, and what its values are divided by."""
    if kind == "arena":
        return "iteration", 1.0
    longest = max(float(curve.x[-1]) for curve in curves)
    unit, scale = ("s", 1.0) if longest < 180 else ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)
    return f"time ({unit})", scale


def _draw(axes: Axes, curve: PlotCurve, style: tuple[str, str], scale: float, name: str) -> None:
    x, (colour, dash) = curve.x / scale, style
    if curve.low is not None and curve.high is not None:
        axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if curve.smooth is not None:
        axes.plot(x, curve.y, color=colour, linewidth=0.7, alpha=0.3)
    marker = "o" if len(x) <= _MARKERS_UP_TO and curve.smooth is None else ""
    bold = curve.y if curve.smooth is None else curve.smooth
    axes.plot(x, bold, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=3, gid=name)

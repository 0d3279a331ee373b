"""The chart of a simulation: held-out loss over time and over traffic, a line a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from fedmoe.monitor.charts.style import blank_figure, dress, plain
from fedmoe.monitor.palette import MUTED, POLICY_COLOURS


def simulation_chart(report: Mapping[str, Any]) -> Figure:
    """Two panels from a report of workers that train; the dotted line is the target."""
    fleet = report["config"]["fleet"]
    second = f"{fleet['workers']} workers that train the tiny model  ·  {fleet['experts']} experts"
    figure = blank_figure("Simulation", second, 12, 5.2, "Dotted: the target of Cost to Target.")
    times, traffic = figure.subplots(1, 2, sharey=True)
    runs = [scheme for scheme in report["schemes"] if scheme["fleet"] == "configured"]
    for place, scheme in enumerate(runs):
        seconds, losses, up, down = zip(*scheme["curve"], strict=True)
        style = {"color": POLICY_COLOURS[place % len(POLICY_COLOURS)], "label": plain(scheme["name"], 40)}
        times.plot(seconds, losses, **style)
        traffic.plot([(a + b) / 1e6 for a, b in zip(up, down, strict=True)], losses, **style)
    dress(times, "over time", "seconds of the virtual clock", "held-out loss, nats per token")
    dress(traffic, "over traffic", "megabytes up and down")
    for axes in (times, traffic):
        axes.axhline(report["target_loss"], color=MUTED, linewidth=1, linestyle=":")
    times.legend(frameon=False, fontsize=8.5)
    return figure

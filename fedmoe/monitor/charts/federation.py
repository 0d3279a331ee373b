"""Chart of a demonstration: training losses of its workers, and held-out losses of its models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import smoothed
from fedmoe.monitor.palette import POLICY_COLOURS
from fedmoe.monitor.picture import png
from fedmoe.runtime.records import Record

_MODEL_COLOURS = ("#999999", "#0072B2", "#009E73")


def loss_chart(records: Iterable[Record], held_out: Mapping[str, Mapping[str, float]]) -> bytes:
    """Training loss over time for every worker, beside held-out bars of `held_out[domain][model]`, as PNG bytes."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _curves(curves, records)
    _bars(bars, held_out)
    return png(figure)


def _curves(axes: Axes, records: Iterable[Record]) -> None:
    losses: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pushes: dict[str, list[float]] = defaultdict(list)
    steps = sorted(records, key=lambda record: float(str(record["at"])))
    for record in steps:
        worker, seconds = str(record["worker"]), float(str(record["at"])) - float(str(steps[0]["at"]))
        if record["kind"] == "step" and record["loss"] is not None:
            losses[worker].append((seconds, float(str(record["loss"]))))
        elif record["kind"] == "push":
            pushes[worker].append(seconds)
    low = min((loss for points in losses.values() for _, loss in points), default=0.0)
    for colour, worker in zip(POLICY_COLOURS, sorted(losses), strict=False):
        x, y = np.array(losses[worker]).T
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        axes.plot(x, smoothed(y, 5), color=colour, label=worker)
        axes.plot(pushes[worker], [low * 0.97] * len(pushes[worker]), "|", color=colour, markersize=9)
    axes.set(xlabel="seconds", ylabel="training loss (nats per token)")
    axes.set_title("Three workers, no rounds (ticks: pushes)", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _bars(axes: Axes, held_out: Mapping[str, Mapping[str, float]]) -> None:
    domains, models = list(held_out), list(next(iter(held_out.values())))
    width = 0.8 / len(models)
    for index, (model, colour) in enumerate(zip(models, _MODEL_COLOURS, strict=False)):
        places = np.arange(len(domains)) + (index - (len(models) - 1) / 2) * width
        drawn = axes.bar(places, [held_out[domain][model] for domain in domains], width, color=colour, label=model)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=1)
    top = max(value for losses in held_out.values() for value in losses.values())
    axes.set_ylim(0, top * 1.25)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("Held-out loss", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=len(models), loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)

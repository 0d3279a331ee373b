"""Chart of a demonstration: training losses of its workers, and held-out losses of its models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.monitor.picture import png
from fedmoe.runtime.records import Record

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def loss_chart(records: Iterable[Record], held_out: Mapping[str, Mapping[str, float]]) -> bytes:
    """Training loss over time for every worker, beside held-out bars of `held_out[domain][model]`, as PNG bytes."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _curves(curves, records)
    _bars(bars, held_out)
    return png(figure)


def _curves(axes: Axes, records: Iterable[Record]) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    pushes: dict[str, list[float]] = defaultdict(list)
    steps = sorted(records, key=lambda record: float(str(record["at"])))
    start = float(str(steps[0]["at"])) if steps else 0.0
    for record in steps:
        worker = str(record["worker"])
        seconds = float(str(record["at"])) - start
        if record["kind"] == "step" and record["loss"] is not None:
            times[worker].append(seconds)
            losses[worker].append(float(str(record["loss"])))
        elif record["kind"] == "push":
            pushes[worker].append(seconds)
    for colour, worker in zip(_COLOURS, sorted(times), strict=False):
        axes.plot(times[worker], losses[worker], color=colour, alpha=0.25, linewidth=1)
        axes.plot(times[worker], _smoothed(losses[worker]), color=colour, label=worker)
    low = min((min(values) for values in losses.values()), default=0.0)
    for colour, worker in zip(_COLOURS, sorted(times), strict=False):
        axes.plot(pushes[worker], [low * 0.97] * len(pushes[worker]), "|", color=colour, markersize=9)
    axes.set(xlabel="seconds", ylabel="training loss (nats per token)")
    axes.set_title("Three workers, no rounds (ticks: pushes)", loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _smoothed(values: list[float], window: int = 5) -> list[float]:
    """The mean of each value and those just before it."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def _bars(axes: Axes, held_out: Mapping[str, Mapping[str, float]]) -> None:
    domains = list(held_out)
    models = list(next(iter(held_out.values())))
    width = 0.8 / len(models)
    for index, (model, colour) in enumerate(zip(models, ("#999999", "#0072B2", "#009E73"), strict=False)):
        places = [place + (index - (len(models) - 1) / 2) * width for place in range(len(domains))]
        values = [held_out[domain][model] for domain in domains]
        drawn = axes.bar(places, values, width, color=colour, label=model)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=1)
    top = max(value for losses in held_out.values() for value in losses.values())
    axes.set_ylim(0, top * 1.25)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("Held-out loss", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=len(models), loc="upper center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

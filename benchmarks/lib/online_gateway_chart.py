"""The chart of `bench_online_gateway.py`: gain on every domain over virtual time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Name of a curve -> colour and line.
STYLES = {
    "online gateway": ("#0072B2", "-"),
    "pooled, speed 4": ("#D55E00", "--"),
    "pooled, mean speed 7/3": ("#D55E00", "-"),
    "pooled, speed 1": ("#D55E00", ":"),
    "pooled, all steps": ("#999999", "-"),
}
#: Steps that one machine with the pooled data does in a unit of time: each worker's, the mean, what all do together.
MACHINES = {"speed 1": 1.0, "speed 2": 2.0, "mean speed 7/3": 7 / 3, "speed 4": 4.0, "all steps": 7.0}
Gains = Mapping[str, Mapping[str, float]]


def chart(gains_by_seed: Sequence[Gains], machines: Mapping[str, float], horizon: int) -> bytes:
    """Gains of the gateway, and of the pooled LoRA at the pace of each machine, the mean over seeds, as PNG bytes."""
    domains = [name for name in gains_by_seed[0]["base"] if name != "mean"] + ["mean"]
    figure = Figure(figsize=(3.4 * len(domains), 3.6), layout="constrained")
    for axes, domain in zip(figure.subplots(1, len(domains)), domains, strict=True):
        for label, (colour, line) in STYLES.items():
            times, values = curve(gains_by_seed, domain, label, machines)
            shown = times <= horizon
            axes.plot(times[shown], values[shown], line, color=colour, marker=".", label=label)
        axes.set_title(domain, loc="left", fontsize=11)
        axes.set(xlabel="virtual time", xlim=(0, horizon * 1.02), ylim=(0, None))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("gain (nats per token)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def curve(
    gains_by_seed: Sequence[Gains], domain: str, label: str, machines: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Times and mean gains, from 0 on."""
    kind, _, machine = label.partition(", ")
    online = kind == "online gateway"
    points = {0.0: 0.0}
    for name in gains_by_seed[0]:
        if online and name.startswith("online, time "):
            points[float(name.rpartition(" ")[2])] = mean_over(gains_by_seed, name, domain)
        elif not online and name.startswith("pooled, "):
            points[float(name.split()[1]) / machines[machine]] = mean_over(gains_by_seed, name, domain)
    times = sorted(points)
    return np.array(times), np.array([points[time] for time in times])


def mean_over(gains_by_seed: Sequence[Gains], name: str, domain: str) -> float:
    return float(np.mean([gains[name][domain] for gains in gains_by_seed]))

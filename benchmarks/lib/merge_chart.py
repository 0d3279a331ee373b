"""The chart of what merges keep, from the results of `bench_merge_quality.py` and `bench_repeated_merges.py`.

Drawn by `python benchmarks/tables.py --charts`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lib.harness import RESULTS

#: Set of domains -> its title, and the aim in percent.
SETS = {
    "demo": ("python, sql, docs", 96),
    "unseen": ("playbooks, typescript, protos", 96),
    "ten": ("ten, some near twins", 90),
}
#: Way -> the benchmark that measured it, its name there, and a colour.
WAYS = {
    "weighted_average": ("merge_quality", "weighted_average", "#999999"),
    "scaled": ("merge_quality", "scaled", "#999999"),
    "regmean": ("merge_quality", "regmean, chosen", "#0072B2"),
    "one lap later, rank 16": ("repeated_merges", "second", "#009E73"),
    "two laps later, rank 16": ("repeated_merges", "third", "#009E73"),
    "three laps later, rank 16": ("repeated_merges", "fourth", "#009E73"),
    "routed": ("merge_quality", "routed", "#D55E00"),
}
Shares = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """What a way keeps of every expert, once for each seed."""

    way: str
    colour: str
    by_seed: tuple[Shares, ...]


def rows_of(domains: str) -> list[Row]:
    """Whatever was measured with these domains."""
    found = []
    for way, (benchmark, model, colour) in WAYS.items():
        file = RESULTS / f"{benchmark}_{domains}.json"
        seeds = json.loads(file.read_bytes())["results"].values() if file.exists() else ()
        by_seed = tuple(
            {domain: one["kept"][model]["value"] for domain, one in seed["test"]["retained"].items()}
            for seed in seeds
            if model in seed["test"]["summary"]
        )
        if by_seed:
            found.append(Row(way, colour, by_seed))
    return found


def chart() -> bytes:
    """A panel for every set: a dot for every domain and seed, a bar at the worst of each seed."""
    rows = {name: rows_of(name) for name in SETS}
    figure = Figure(figsize=(11.5, 3.3), layout="constrained")
    panels = figure.subplots(1, len(SETS), sharey=True)
    labels = list(WAYS)
    for axes, (name, (title, aim)) in zip(panels, SETS.items(), strict=True):
        for row in rows[name]:
            _draw(axes, labels.index(row.way), row)
        axes.axvline(aim, color="#444444", linewidth=0.8, linestyle=":")
        seeds = len(rows[name][0].by_seed)
        axes.set_title(f"{title}  ({seeds} seed{'s' if seeds > 1 else ''})", loc="left", fontsize=10)
        axes.set_xlim(25, 118)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.supxlabel(
        "% of the own expert's gain kept   (dot: a domain of a seed, bar: the worst of a seed, dotted: the aim)",
        fontsize=9,
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Axes, place: int, row: Row) -> None:
    for number, shares in enumerate(row.by_seed):
        # Seeds lie one above the other.
        height = place + (number - (len(row.by_seed) - 1) / 2) * 0.22
        kept = [100 * share for share in shares.values()]
        axes.plot(kept, [height] * len(kept), ".", color=row.colour, markersize=5, alpha=0.7)
        axes.plot([min(kept)] * 2, [height - 0.11, height + 0.11], color=row.colour, linewidth=2.5)

"""Curves of runs for a figure or a table: of the arena over iterations, of a federation over time, side by side."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, smoothed, smoothing_span
from fedmoe.monitor.chart_data import TREND_PANELS
from fedmoe.runtime.records import Record

RunKind = Literal["arena", "federation"]
#: What the curves of a kind of run lie over.
AXES: Mapping[RunKind, str] = {"arena": "iteration", "federation": "seconds"}
_TRENDS = {column: (title, unit) for column, title, unit in TREND_PANELS if column != "accuracy"}
#: Measure -> title and unit of its panel, in the order of the panels.
MEASURES: Mapping[str, tuple[str, str]] = {
    "score": ("Held-out score", "mean score (band: 95 %)"),
    **_TRENDS,
    "held_out_loss": ("Held-out loss", "nats per token"),
    "training_loss": ("Training loss", "nats per token"),
}
_LOSSES = {"held_out": "held_out_loss", "step": "training_loss"}
_SMOOTHED_FROM = 8
# Seconds without any record after which a federation was not running.
_PAUSE = 3600.0


@dataclass(frozen=True, slots=True)
class PlotCurve:
    """A curve of at least one point: `x`, `y` as recorded, `smooth` their moving average, ends of the interval.

    All float64 (n,); `smooth`, `low` and `high` are None where there are none. A score is `against` an opponent.
    """

    run: str
    measure: str
    name: str
    x: Float64Array
    y: Float64Array
    smooth: Float64Array | None = None
    low: Float64Array | None = None
    high: Float64Array | None = None
    against: str = ""


def arena_plot(run: str, series: ArenaSeries) -> list[PlotCurve]:
    """Score with its interval over questions, reward, KL divergence and entropy of every policy over the iterations."""
    return [*_scores(run, series), *_trends(run, series)]


def _scores(run: str, series: ArenaSeries) -> Iterator[PlotCurve]:
    """Against the opponent that was met most often: scores against others mean something else."""
    scored = [point for point in series.evaluations if math.isfinite(point.score.value)]
    counts = Counter(point.opponent for point in scored)
    opponent = max(counts, key=lambda name: counts[name], default="")
    for policy in series.policies:
        points = [point for point in scored if (point.policy, point.opponent) == (policy, opponent)]
        if points:
            rows = [(point.iteration, point.score.value, point.score.low, point.score.high) for point in points]
            x, y, low, high = np.array(rows, dtype=np.float64).T
            yield PlotCurve(run, "score", policy, x, y, low=low, high=high, against=opponent)


def _trends(run: str, series: ArenaSeries) -> Iterator[PlotCurve]:
    span = smoothing_span(series)
    for column in _TRENDS:
        for policy in series.policies:
            x, y = series.tables[policy].points(column)
            if len(x):
                yield PlotCurve(run, column, policy, x, y, _smooth(y, span))


def federation_plot(run: str, records: Iterable[Record]) -> list[PlotCurve]:
    """Held-out and training loss over the seconds since the first record, of every expert, or each of its workers.

    `records` are those of workers, of kind `held_out` and `step`; others and losses that are no numbers are left out.
    """
    rows = sorted((row for record in records if (row := _loss_of(record)) is not None), key=lambda row: row[3])
    times = _running_time([at for *_, at, _ in rows])
    points: defaultdict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    workers: defaultdict[str, set[str]] = defaultdict(set)
    for (measure, expert, worker, _, loss), seconds in zip(rows, times, strict=True):
        points[measure, expert, worker].append((seconds, loss))
        workers[expert].add(worker)
    curves = []
    for measure, expert, worker in sorted(points):
        x, y = np.array(points[measure, expert, worker], dtype=np.float64).T
        name = f"{expert}, {worker}" if len(workers[expert]) > 1 else expert
        smooth = _smooth(y, max(3.0, len(y) / 15)) if measure == "training_loss" else None
        curves.append(PlotCurve(run, measure, name, x, y, smooth))
    return curves


def _smooth(values: Float64Array, span: float) -> Float64Array | None:
    """Their moving average; None for a few, which show themselves."""
    return smoothed(values, span) if len(values) >= _SMOOTHED_FROM else None


def _loss_of(record: Record) -> tuple[str, str, str, float, float] | None:
    """Measure, expert, worker, moment and loss of a record."""
    measure, at, loss = _LOSSES.get(str(record.get("kind"))), record.get("at"), record.get("loss")
    numbers = isinstance(at, int | float) and isinstance(loss, int | float)
    if measure is None or not numbers or not math.isfinite(float(str(loss))):
        return None
    return measure, str(record.get("expert", "")), str(record.get("worker", "")), float(str(at)), float(str(loss))


def _running_time(moments: Sequence[float]) -> list[float]:
    """Seconds since the first of ascending moments, without pauses of more than an hour."""
    times = [0.0] * len(moments)
    for index in range(1, len(moments)):
        gap = moments[index] - moments[index - 1]
        times[index] = times[index - 1] + (gap if gap <= _PAUSE else 0.0)
    return times


def csv_table(kind: RunKind, curves: Iterable[PlotCurve]) -> str:
    """The curves as CSV, a row a point; what a curve does not have is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "measure", "series", "against", AXES[kind], "value", "smoothed", "low", "high"])
    for curve in curves:
        columns = (curve.x, curve.y, curve.smooth, curve.low, curve.high)
        for index in range(len(curve.x)):
            numbers = ("" if column is None else _number(float(column[index])) for column in columns)
            table.writerow([curve.run, curve.measure, curve.name, curve.against, *numbers])
    return text.getvalue()


def _number(value: float) -> str:
    return f"{value:.10g}" if math.isfinite(value) else ""

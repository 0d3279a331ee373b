"""Evaluation metrics of installed packages: further numbers on every iteration's episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from fedmoe.arena.trajectory import PlayedEpisode

#: Entry points of this group add metrics: name -> a callable from an iteration's episodes to a number.
ENTRY_POINTS = "fedmoe.metrics"

Metric = Callable[[Sequence[PlayedEpisode]], float]


class MetricError(ValueError):
    """A metric that is no callable or gives no finite number."""


def installed_metrics() -> dict[str, Metric]:
    """All metrics of installed packages by name; two of one name are an error."""
    found: dict[str, Metric] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise MetricError(f"metric {point.name!r} is offered twice ({point.value}); uninstall one of the packages")
        metric = point.load()
        if not callable(metric):
            raise MetricError(f"metric {point.name!r} ({point.value}) is a {type(metric).__name__}, not a callable")
        found[point.name] = metric
    return found


def measured(metrics: Mapping[str, Metric], played: Sequence[PlayedEpisode]) -> dict[str, float]:
    """Every metric's number for one iteration."""
    values = {name: float(metric(played)) for name, metric in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise MetricError(f"metric {name!r} gave {value}; a metric must give a finite number")
    return values

"""Evaluation metrics of installed packages: further numbers on every iteration's episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

import structlog

from fedmoe.arena.rollout.episodes import PlayedEpisode
from fedmoe.runtime.errors import ExpectedError

_log = structlog.get_logger("fedmoe.arena")

#: Entry points of this group add metrics: name -> a callable from an iteration's episodes to a number.
ENTRY_POINTS = "fedmoe.metrics"

Metric = Callable[[Sequence[PlayedEpisode]], float]


class MetricError(ExpectedError, ValueError):
    """A metric that is no callable, or one of two with the same name."""


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


def measured(metrics: Mapping[str, Metric], played: Sequence[PlayedEpisode]) -> dict[str, float | None]:
    """Every metric's number for one iteration; None, with a warning, where it raises or gives no finite number."""
    return {name: _measured(name, metric, played) for name, metric in metrics.items()}


def _measured(name: str, metric: Metric, played: Sequence[PlayedEpisode]) -> float | None:
    try:
        value = float(metric(played))
    except Exception as error:  # a plug-in's code: it may raise anything
        _log.warning("metric_missing", metric=name, reason=f"it raised {type(error).__name__}: {error}")
        return None
    if not math.isfinite(value):
        _log.warning("metric_missing", metric=name, reason=f"it gave {value}")
        return None
    return value

"""Plug-in metrics: extra numbers that installed packages compute from the episodes of each iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import structlog

from fedmoe.arena.rollout.episodes import PlayedEpisode
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.plugins import PluginGroup

_log = structlog.get_logger("fedmoe.arena")

#: From an iteration's episodes to a number; packages offer them in the entry-point group `fedmoe.metrics`.
Metric = Callable[[Sequence[PlayedEpisode]], float]


class MetricError(ExpectedError, ValueError):
    """A metric that is not callable, or one of two with the same name."""


_PLUGINS: PluginGroup[Metric] = PluginGroup("fedmoe.metrics", "metric", MetricError, {})


def installed_metrics() -> dict[str, Metric]:
    """All metrics of installed packages by name; raises MetricError for two of one name."""
    return _PLUGINS.installed()


def evaluate_metrics(metrics: Mapping[str, Metric], played: Sequence[PlayedEpisode]) -> dict[str, float | None]:
    """Every metric's number for one iteration; None, with a warning, where it raises or gives no finite number."""
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        try:
            value = float(metric(played))
            reason = "" if math.isfinite(value) else f"it gave {value}"
        except Exception as error:  # a plug-in's code: it may raise anything
            reason = f"it raised {type(error).__name__}: {error}"
        values[name] = None if reason else value
        if reason:
            _log.warning("metric_missing", metric=name, reason=reason)
    return values

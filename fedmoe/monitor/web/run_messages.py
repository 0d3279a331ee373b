"""What the page shows of runs: tables and figures as plain JSON values, made from the runs' records."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedmoe.monitor.arena_series import ArenaSeries, Estimate, NoRecordsError, arena_series
from fedmoe.monitor.interactive.figures import interactive_figures
from fedmoe.runtime.records import RecordFile

RECORDS = "metrics.jsonl"
#: A surface makes code while it runs, which the page's policy forbids; decisions are a table here.
_LEFT_OUT = frozenset({"surface", "decisions"})
_MOST_DECISIONS = 200
# More points than a chart has pixels say nothing.
_MOST_POINTS = 500
_MACHINE = (
    *("cpu_percent", "memory_percent", "process_bytes", "gpu_percent", "gpu_memory_bytes"),
    *("disk_percent", "disk_free_bytes"),
)


class RunMessages:
    """The runs in some folders, in their order; a run is read and described again only where its records changed.

    For one thread at a time.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        names = Counter(folder.name for folder in folders)
        self._runs = [_Run(folder, folder.name if names[folder.name] == 1 else str(folder)) for folder in folders]

    def fingerprint(self) -> str:
        """Changes whenever the records of a run do."""
        return "-".join(run.stamp() for run in self._runs)

    def text(self) -> str:
        """The state of all runs as one line of JSON."""
        return f'{{"runs": [{", ".join(run.text() for run in self._runs)}]}}'


class _Run:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name or str(folder)
        self._records = RecordFile(folder / RECORDS)
        self._described = ("", "")

    def stamp(self) -> str:
        try:
            status = (self._folder / RECORDS).stat()
        except FileNotFoundError:
            return "0"
        return f"{status.st_ino:x}.{status.st_size:x}.{status.st_mtime_ns:x}"

    def text(self) -> str:
        stamp = self.stamp()
        if stamp != self._described[0]:
            # The stamp is from before the reading: what comes in between is read again.
            self._described = (stamp, json.dumps(self._describe(), allow_nan=False))
        return self._described[1]

    def _describe(self) -> dict[str, object]:
        name: dict[str, object] = {"name": self._name, "path": str(self._folder)}
        try:
            series = arena_series(self._records.all())
        except FileNotFoundError:
            return name | {"problem": "there are no records yet"}
        except NoRecordsError as error:
            return name | {"problem": str(error)}
        return name | {"problem": ""} | _run(series)


def _run(series: ArenaSeries) -> dict[str, object]:
    return {
        **asdict(series.facts),
        "iterations": [int(place) for place in series.iterations],
        "policies": [_policy(series, policy) for policy in series.policies],
        "wins": [
            {"policy": point.policy, "opponent": point.opponent, "win": _estimate(point.win)}
            for point in series.final_evaluations()
        ],
        "decisions": [
            {"iteration": point.iteration, "policy": point.policy, "what": point.what}
            | {"before": point.before, "after": point.after, "reason": point.reason}
            for point in reversed(series.decisions[-_MOST_DECISIONS:])
        ],
        "machine": {name: _number(series.system.last(name)) for name in _MACHINE}
        | {"tokens_per_second": _number(series.timing.recent("tokens_per_second"))},
        "figures": [
            {"name": figure.name, "title": figure.title, "layout": figure.layout}
            | {"data": [thinned(trace) for trace in figure.data]}
            for figure in interactive_figures(series)
            if figure.name not in _LEFT_OUT
        ],
    }


def _policy(series: ArenaSeries, policy: str) -> dict[str, object]:
    table = series.tables[policy]
    points = [point for point in series.final_evaluations() if point.policy == policy]
    point = max(points, key=lambda point: point.iteration, default=None)
    shown: dict[str, object] = {"policy": policy, "rating": _number(series.rating[policy].last("mu"))}
    shown["sigma"] = _number(series.rating[policy].last("sigma"))
    shown |= {name: _number(table.recent(name)) for name in ("reward", "kl", "entropy", "staleness")}
    shown["score"] = None if point is None else _estimate(point.score)
    shown["questions"] = None if point is None else _number(point.questions)
    return shown


def thinned(trace: Mapping[str, object]) -> dict[str, object]:
    """A curve of at most about `_MOST_POINTS` points, the first and the last of them kept; others as they are."""
    x = trace.get("x")
    if trace.get("type") != "scatter" or not isinstance(x, list) or len(x) <= _MOST_POINTS:
        return dict(trace)
    count, step = len(x), math.ceil(len(x) / _MOST_POINTS)
    places = [*range(0, count - 1, step), count - 1]

    def part(value: object) -> object:
        if isinstance(value, dict):
            return {name: part(inner) for name, inner in value.items()}
        return [value[place] for place in places] if isinstance(value, list) and len(value) == count else value

    return {name: part(value) for name, value in trace.items()}


def _estimate(estimate: Estimate) -> list[float | None]:
    return [_number(estimate.value), _number(estimate.low), _number(estimate.high)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None

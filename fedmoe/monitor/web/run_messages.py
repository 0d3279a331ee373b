"""What the page shows of runs: tables and figures as plain JSON values, made from the runs' records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from fedmoe.monitor.arena_series import ArenaSeries, Estimate, NoRecordsError, arena_series
from fedmoe.monitor.interactive.figures import interactive_figures
from fedmoe.monitor.palette import run_line
from fedmoe.runtime.records import read_records

RECORDS = "metrics.jsonl"
#: A surface makes code while it runs, which the page's policy forbids; decisions are a table here.
_LEFT_OUT = frozenset({"surface", "decisions"})
_MOST_DECISIONS = 200


def runs_message(folders: Sequence[Path]) -> str:
    """The state of all runs, in the order of the folders, as one line of JSON."""
    return json.dumps({"runs": [_run(folder) for folder in folders]}, allow_nan=False)


def fingerprint(folders: Sequence[Path]) -> str:
    """Changes whenever the records of a run do."""
    return "-".join(_stamp(folder / RECORDS) for folder in folders)


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError:
        return "0"
    return f"{found.st_ino:x}.{found.st_size:x}.{found.st_mtime_ns:x}"


def _run(folder: Path) -> dict[str, object]:
    try:
        series = arena_series(read_records(folder / RECORDS))
    except (FileNotFoundError, NoRecordsError) as error:
        return {"name": str(folder), "problem": str(error)}
    return {
        "name": str(folder),
        "problem": "",
        "facts": run_line(series, lambda text, longest: text),
        "sample": series.facts.sample,
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
        "figures": [
            {"name": figure.name, "title": figure.title, "data": figure.data, "layout": figure.layout}
            for figure in interactive_figures(series)
            if figure.name not in _LEFT_OUT
        ],
    }


def _policy(series: ArenaSeries, policy: str) -> dict[str, object]:
    table = series.tables[policy]
    points = [point for point in series.final_evaluations() if point.policy == policy]
    point = max(points, key=lambda point: point.iteration, default=None)
    shown: dict[str, object] = {"policy": policy, "rating": _number(series.rating[policy].last("mu"))}
    shown |= {name: _number(table.recent(name)) for name in ("reward", "kl", "entropy", "staleness")}
    shown["score"] = None if point is None else _estimate(point.score)
    shown["questions"] = None if point is None else _number(point.questions)
    return shown


def _estimate(estimate: Estimate) -> list[float | None]:
    return [_number(estimate.value), _number(estimate.low), _number(estimate.high)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None

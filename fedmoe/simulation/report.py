"""The report of a simulation: what was counted, and what an operator asks of it; the same runs give the same report.

*Cost to Target*, *Quality under Budget* and *Robustness* are asked of losses, so only of workers that train.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedmoe.simulation.config import SimulationConfig
from fedmoe.simulation.run import SchemeRun
from fedmoe.simulation.tally import CurvePoint

REPORT_FORMAT = 1
NOTES = {
    "training": "Workers trained the tiny model; losses are held-out losses in nats per token.",
    "recorded": "Deltas were recorded or drawn, nothing was trained: traffic, staleness and disk only, no losses.",
}
_MEGABYTE = 1e6
# A journal of 100,000 updates has 70 MiB (benchmarks/results/recovery.json).
_JOURNAL_BYTES = 734

Json = dict[str, object]


def make_report(config: SimulationConfig, parameters: int, runs: Sequence[SchemeRun]) -> Json:
    """The report as JSON values; it holds no time but that of the virtual clock."""
    report: Json = {
        "format": REPORT_FORMAT,
        "work": config.work.kind,
        "note": NOTES[config.work.kind],
        "parameters": parameters,
        "config": config.model_dump(mode="json"),
        "schemes": [_counts(run, config.seconds) for run in runs],
    }
    if config.work.kind == "training":
        report |= _comparison(config, runs)
    return report


def _counts(run: SchemeRun, seconds: float) -> Json:
    tally = run.tally
    accepted = sum(tally.accepted.values())
    by_worker = sorted(tally.accepted[number] for number in range(run.workers))
    per_second = Counter({second: tally.arrivals[second] for second in range(math.ceil(seconds))})
    return {
        "name": run.scheme.name,
        "kind": run.scheme.kind,
        "fleet": _fleet(run),
        "updates": {
            "arrived": sum(tally.arrivals.values()),
            "accepted": accepted,
            "refused": dict(sorted(tally.refused.items())),
            "held": tally.held,
            "uploads_cut_off": tally.cut_off,
        },
        "accepted_by_worker": _spread(Counter(by_worker)),
        "staleness": _spread(tally.staleness) | {"counts": _histogram(tally.staleness)},
        "bytes": {"up": tally.bytes_up, "down": tally.bytes_down},
        "disk_bytes": {
            "updates": tally.stored_bytes,
            "snapshots": run.snapshot_bytes,
            "journal_about": _JOURNAL_BYTES * tally.stored,
        },
        "arrivals_per_second": _spread(Counter(per_second.values())),
        "longest_queue_seconds": round(tally.longest_queue_seconds, 6),
        "steps": tally.steps,
        "rounds": tally.rounds,
        "versions": dict(sorted(run.versions.items())),
        "digests": dict(sorted(run.digests.items())),
        "curve": [[point.seconds, point.loss, point.bytes_up, point.bytes_down] for point in tally.curve],
    }


def _fleet(run: SchemeRun) -> str:
    return "ideal" if run.ideal else "configured"


def _histogram(counts: Counter[int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts)}


def _spread(counts: Counter[int]) -> Json:
    """Least, mean, median, 90th and 99th percentile and most of counted values; None without any."""
    total = sum(counts.values())
    if not total:
        return dict.fromkeys(("least", "mean", "median", "p90", "p99", "most"))
    values = sorted(counts)
    mean = sum(value * count for value, count in counts.items()) / total
    shares = {name: _quantile(counts, values, total * share) for name, share in _QUANTILES.items()}
    return {"least": values[0], "mean": round(mean, 6), **shares, "most": values[-1]}


_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


def _quantile(counts: Mapping[int, int], values: Sequence[int], rank: float) -> int:
    """The smallest value that `rank` of all values do not exceed."""
    below = 0
    for value in values:
        below += counts[value]
        if below >= rank:
            return value
    return values[-1]


def _comparison(config: SimulationConfig, runs: Sequence[SchemeRun]) -> Json:
    """Costs, qualities and robustness of all schemes on the configured fleet."""
    measured = [run for run in runs if not run.ideal]
    baseline = next(run for run in measured if run.scheme.name == config.baseline)
    first = baseline.tally.curve[0].loss
    target = first - config.report.target * (first - _lowest(baseline.tally.curve))
    budgets = (
        config.report.budget_seconds or config.seconds / 3,
        config.report.budget_megabytes
        or min(run.tally.bytes_up + run.tally.bytes_down for run in measured) / _MEGABYTE,
    )
    ideal = {run.scheme.name: run for run in runs if run.ideal}
    rows = [_compared(run, baseline, target, budgets, ideal.get(run.scheme.name)) for run in measured]
    return {
        "baseline": config.baseline,
        "first_loss": first,
        "target_loss": target,
        "budgets": {"seconds": budgets[0], "megabytes": budgets[1]},
        "comparison": rows,
    }


def _compared(
    run: SchemeRun, baseline: SchemeRun, target: float, budgets: tuple[float, float], ideal: SchemeRun | None
) -> Json:
    curve, seconds, megabytes = run.tally.curve, *budgets
    first = curve[0].loss
    gain, other = first - _lowest(curve), first - _lowest(baseline.tally.curve)
    in_time = [point for point in curve if point.seconds <= seconds]
    in_bytes = [point for point in curve if point.bytes_up + point.bytes_down <= megabytes * _MEGABYTE]
    row: Json = {
        "name": run.scheme.name,
        "lowest_loss": _lowest(curve),
        "gain_of_baseline": gain / other if other > 0 else None,
        "cost_to_target": _cost(curve, target, baseline.tally.curve),
        "quality_under_budget": {"seconds": _lowest(in_time), "megabytes": _lowest(in_bytes)},
    }
    if ideal is not None:
        best = first - _lowest(ideal.tally.curve)
        row["robustness"] = {
            "gain_of_ideal": gain / best if best > 0 else None,
            "seconds_to_target_ideal": _seconds(_reached(ideal.tally.curve, target)),
        }
    return row


def _cost(curve: Sequence[CurvePoint], target: float, baseline: Sequence[CurvePoint]) -> Json:
    """Seconds and megabytes until the loss is at the target; None where it never is."""
    point, other = _reached(curve, target), _reached(baseline, target)
    if point is None:
        return {"seconds": None, "megabytes_up": None, "megabytes_down": None, "seconds_of_baseline": None}
    share = point.seconds / other.seconds if other is not None and other.seconds > 0 else None
    return {
        "seconds": point.seconds,
        "megabytes_up": point.bytes_up / _MEGABYTE,
        "megabytes_down": point.bytes_down / _MEGABYTE,
        "seconds_of_baseline": share,
    }


def _reached(curve: Sequence[CurvePoint], target: float) -> CurvePoint | None:
    return next((point for point in curve if point.loss <= target), None)


def _seconds(point: CurvePoint | None) -> float | None:
    return point.seconds if point is not None else None


def _lowest(curve: Sequence[CurvePoint]) -> float:
    return min(point.loss for point in curve)

"""Result files of a run, built from its records: results of every policy, and the report on the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Literal

from fedmoe.arena.rollout.interval import FEW_QUESTIONS, few_questions
from fedmoe.arena.run.checkpoint import Json, config_digest
from fedmoe.runtime.files import write_atomic
from fedmoe.runtime.records import Record, RecordValue

RESULTS = "multi_model_training_simple_results.json"
REPORT = "run_report.json"
FORMAT = 1
_CURVE = ("mode", "reward", "accuracy", "valid", "efficiency_second", "efficiency_token", "kl", "entropy")
_TEAM = ("mode", "cooperation", "completion", "utilisation", "team_score")
_CREDIT = ("iteration", "shared", "difference", "individual", "versus")
_RATING = ("mu", "sigma", "games")
_HELD_OUT = ("iteration", "mode", "score", "low", "high", "episodes", "questions")
_BASE = ("base_score", "base_low", "base_high")
_WIN = ("iteration", "mode", "opponent", "win_rate", "win_low", "win_high", "episodes", "questions")
_LEADER = ("iteration", "mode", "apart", "rival", "lead", "lead_low", "lead_high", "questions")
_TIMING = ("rollout_seconds", "learn_seconds", "iteration_seconds", "tokens", "tokens_per_second")
_NOT_MEASURES = ("at", "kind", "policy")

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended, or that it still runs; `reason` in words for people."""

    status: Status
    reason: str = ""


def build_results(records: RunRecords, adapters: Mapping[str, str], lineage: Sequence[Json]) -> dict[str, object]:
    """The content of the result file: what every policy reached and how it got there.

    `adapters`: content hash by `NAME@VERSION`, of the newest versions. `lineage`: which policy came of which.
    """
    policies = {name: _policy_results(name, policy, adapters) for name, policy in records.policies.items()}
    return {
        "format": FORMAT,
        "task": records.run.get("task"),
        "mode": records.run.get("mode"),
        "modes_run": _stretches(records),
        "base_model": records.run.get("base_model"),
        "seed": records.run.get("seed"),
        "sample": bool(records.run.get("sample", False)),
        "iterations": len(records.steps),
        "best": _best(records),
        "policies": policies,
        "cooperation": _curve(records.teams, _TEAM),
        "decisions": [_without(record, "at", "kind") for record in records.decisions],
        "lineage": [dict(birth) for birth in lineage],
    }


def _policy_results(name: str, policy: PolicyRecords, adapters: Mapping[str, str]) -> dict[str, object]:
    last = policy.last
    return {
        "held_out": _held_out(policy),
        "against": _newest_wins(policy),
        "weight_updates": last.get("weight_updates"),
        "version": last.get("version"),
        "adapters": {key: digest for key, digest in adapters.items() if key.rpartition("@")[0] == name},
        "rating": _chosen(policy.rating, _RATING) if policy.rating else None,
        "credit": _chosen(policy.credit, _CREDIT) if policy.credit else None,
        "totals": {what: policy.total(what) for what in ("episodes", "turns", "tokens")},
        "over_time": _curve(policy.turns, _CURVE),
    }


def _best(records: RunRecords) -> dict[str, object] | None:
    """The policy that is surely ahead of every other on held-out questions; None by name where none is."""
    if records.leader is None:
        return None
    apart = records.leader.get("apart") is True
    return {"policy": records.leader.get("policy") if apart else None, **_chosen(records.leader, _LEADER)}


def _held_out(policy: PolicyRecords) -> dict[str, object] | None:
    """First and last held-out score with their intervals, the base model's, and the gain between first and last."""
    scored = [record for record in policy.evaluations.values() if record.get("score") is not None]
    if not scored:
        return None
    first, last = scored[0], scored[-1]
    return {
        "initial": _chosen(first, _HELD_OUT),
        "final": _chosen(last, _HELD_OUT),
        "base_model": _chosen(last, _BASE),
        "gain": number(last["score"]) - number(first["score"]),
        "over_time": [_chosen(record, _HELD_OUT) for record in scored],
    }


def _newest_wins(policy: PolicyRecords) -> list[dict[str, RecordValue]]:
    """The newest win rate against each opponent, with its interval."""
    measured = (record for record in policy.evaluations.values() if record.get("win_rate") is not None)
    return [_chosen(record, _WIN) for record in {record.get("opponent"): record for record in measured}.values()]


def _stretches(records: RunRecords) -> list[dict[str, RecordValue]]:
    """Which mode ran from which iteration to which, both included."""
    by_mode = [[*steps] for _, steps in groupby(records.steps, key=lambda step: step[1])]
    return [{"mode": steps[0][1], "first": steps[0][0], "last": steps[-1][0]} for steps in by_mode]


def _curve(records: Mapping[Step, Record], fields: Sequence[str]) -> dict[str, list[RecordValue]]:
    """Columns over iterations; those that were never recorded are left out."""
    columns = {name: [record.get(name) for record in records.values()] for name in fields}
    there = {name: column for name, column in columns.items() if any(value is not None for value in column)}
    return {"iteration": [iteration for iteration, _ in records]} | there


def build_metrics(records: RunRecords) -> dict[str, object]:
    """The newest measurements of everything, for a checkpoint's performance_metrics.json."""
    iteration, mode = next(reversed(records.steps), (None, None))
    return {
        "format": FORMAT,
        "iteration": iteration,
        "mode": mode,
        "policies": {name: _policy_metrics(policy) for name, policy in records.policies.items()},
        "team": _chosen(next(reversed(records.teams.values()), {}), ("iteration", *_TEAM)),
        "timing": _chosen(next(reversed(records.timings.values()), {}), _TIMING),
        "system": _without(records.system, *_NOT_MEASURES),
    }


def _policy_metrics(policy: PolicyRecords) -> dict[str, object]:
    held_out = _held_out(policy)
    return {
        **_without(policy.last, *_NOT_MEASURES),
        "rating": _chosen(policy.rating, _RATING) if policy.rating else None,
        "held_out": held_out["final"] if held_out else None,
    }


def build_report(
    records: RunRecords,
    *,
    config: Json,
    environment: Json,
    started: float,
    ended: float,
    ending: RunOutcome,
    checkpoints: Sequence[str],
    resumed_from: str | None,
) -> dict[str, object]:
    """The content of the run report: under which circumstances a run took place. Times in seconds since 1970."""
    return {
        "format": FORMAT,
        "status": ending.status,
        "reason": ending.reason,
        "started": _iso(started),
        "ended": None if ending.status == "running" else _iso(ended),
        "seconds": round(ended - started, 3),
        "resumed_from": resumed_from,
        "task": records.run.get("task"),
        "sample": bool(records.run.get("sample", False)),
        "seed": records.run.get("seed"),
        "config": dict(config),
        "config_digest": config_digest(config),
        "environment": dict(environment),
        "work": _work(records),
        "warnings": _warnings(records),
        "peaks": dict(records.peaks),
        "checkpoints": list(checkpoints),
        "decisions": [_without(record, "kind") for record in records.decisions],
    }


def _work(records: RunRecords) -> dict[str, object]:
    """What was done and how fast; rates are over the time of the iterations, not over that of the process."""
    sums = {name: sum(number(record.get(name)) for record in records.timings.values()) for name in _TIMING[:4]}
    seconds = sums["iteration_seconds"]
    return {
        "iterations": len(records.steps),
        "episodes": sum(policy.total("episodes") for policy in records.policies.values()),
        "skipped_episodes": sum(number(record.get("episodes")) for record in records.skipped),
        "weight_updates": sum(number(policy.last.get("weight_updates")) for policy in records.policies.values()),
        **sums,
        "tokens_per_second": sums["tokens"] / seconds if seconds else None,
    }


def _warnings(records: RunRecords) -> list[str]:
    """What a reader of the results must know: episodes that were left out, and comparisons over few questions."""
    warnings = []
    for where in ("training", "evaluation"):
        skipped = [record for record in records.skipped if record.get("where") == where]
        if skipped:
            count = sum(int(number(record.get("episodes"))) for record in skipped)
            reason = skipped[-1].get("reason")
            warnings.append(f"{count} episodes of {where} failed and were left out, the last by {reason}")
    newest = [list(policy.evaluations.values())[-1] for policy in records.policies.values() if policy.evaluations]
    questions = [asked for record in newest if isinstance(asked := record.get("questions"), int)]
    if questions and min(questions) < FEW_QUESTIONS:
        warnings.append(few_questions(min(questions)))
    return warnings


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def number(value: RecordValue) -> float:
    """A recorded number; 0 for one that was not recorded."""
    return value if isinstance(value, int | float) else 0.0


def _chosen(record: Record, names: Sequence[str]) -> dict[str, RecordValue]:
    return {name: record.get(name) for name in names}


def _without(record: Record, *names: str) -> dict[str, RecordValue]:
    return {name: value for name, value in record.items() if name not in names}


def write_json(path: Path, values: Json) -> None:
    """Write a result file so that a reader finds the old one or the new one; raises OSError, ValueError for a NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


#: Iteration and mode: a run of several modes one after another counts its iterations anew in each.
Step = tuple[RecordValue, RecordValue]


@dataclass(slots=True)
class PolicyRecords:
    """The records of one policy, in the order of time; one of a step that was repeated takes the place of the first."""

    turns: dict[Step, Record] = field(default_factory=dict)
    evaluations: dict[tuple[RecordValue, RecordValue, RecordValue], Record] = field(default_factory=dict)
    credit: Record | None = None
    rating: Record | None = None

    @property
    def last(self) -> Record:
        """What was recorded of it in its last iteration."""
        return next(reversed(self.turns.values())) if self.turns else {}

    def total(self, what: str) -> int:
        """The sum of a count over all iterations."""
        counts = (record.get(what) for record in self.turns.values())
        return sum(count for count in counts if isinstance(count, int))


@dataclass(slots=True)
class RunRecords:
    """All records of one run.

    `steps`: iterations with their modes, in the order of time. `peaks`: of every percentage and count of bytes of the
    system the worst value; that is the largest, but of bytes that are free the smallest.
    """

    run: Record = field(default_factory=dict)
    policies: dict[str, PolicyRecords] = field(default_factory=dict)
    teams: dict[Step, Record] = field(default_factory=dict)
    timings: dict[Step, Record] = field(default_factory=dict)
    decisions: list[Record] = field(default_factory=list)
    skipped: list[Record] = field(default_factory=list)
    leader: Record | None = None
    system: Record = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    steps: dict[Step, None] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Sort one record in; kinds that are not known here are left out."""
        step = (record.get("iteration"), record.get("mode"))
        match record.get("kind"):
            case "run":
                self.run = record
                names = record.get("policies")
                for name in names.split(",") if isinstance(names, str) else ():
                    self.policies.setdefault(name.strip(), PolicyRecords())
            case "policy":
                self.steps[step] = None
                self._policy(record).turns[step] = record
            case "evaluation":
                self._policy(record).evaluations[(*step, record.get("opponent"))] = record
            case "credit":
                self._policy(record).credit = record
            case "rating":
                self._policy(record).rating = record
            case "team":
                self.teams[step] = record
            case "timing":
                self.timings[step] = record
            case "decision":
                self.decisions.append(record)
            case "skipped":
                self.skipped.append(record)
            case "leader":
                self.leader = record
            case "system":
                self.system = record
                self._raise_peaks(record)

    def _policy(self, record: Record) -> PolicyRecords:
        return self.policies.setdefault(str(record.get("policy")), PolicyRecords())

    def _raise_peaks(self, record: Record) -> None:
        for name, value in record.items():
            if name.endswith(("_bytes", "_percent")) and isinstance(value, int | float):
                worst = min if "_free_" in name else max
                self.peaks[name] = worst(self.peaks.get(name, value), value)


def sort_records(records: Iterable[Record]) -> RunRecords:
    """Sort the records of a run, as `fedmoe.runtime.records.read_records` gives them."""
    run_records = RunRecords()
    for record in records:
        run_records.add(record)
    return run_records

"""Series and tables of an arena run, from its records: what charts need, computed without a drawing library."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.runtime.records import Record, RecordValue

#: Kinds of records an arena run writes.
KINDS = ("run", "policy", "team", "credit", "rating", "evaluation", "leader", "decision", "timing", "system")


class NoRecordsError(ValueError):
    """There is nothing to show: no record of an arena run was given."""


@dataclass(frozen=True, slots=True)
class SeriesTable:
    """Numbers over `x` (iterations, or seconds): float64 (n,), ascending; each column (n,), NaN where none came."""

    x: Float64Array
    columns: Mapping[str, Float64Array]

    def __len__(self) -> int:
        return len(self.x)

    def column(self, name: str) -> Float64Array:
        """One column, float64 (n,); all NaN when it was never recorded."""
        return self.columns.get(name, np.full(len(self.x), np.nan))

    def points(self, name: str) -> tuple[Float64Array, Float64Array]:
        """The places and values where the column is a number, both (m,) with m <= n."""
        values = self.column(name)
        there = np.isfinite(values)
        return self.x[there], values[there]

    def recent(self, name: str) -> float:
        """Mean of the column's last fifth (see `window`); NaN when there is none."""
        values = self.points(name)[1]
        return float(values[-window(len(values)) :].mean()) if len(values) else math.nan

    def rate(self, name: str, per: str) -> float:
        """Of the last fifth the sum of one column over that of another, where both are there; NaN when there is none.

        Not the mean of the ratios, which a single short iteration would decide.
        """
        above, below = self._recent_both(name, per)
        return float(above.sum() / below.sum()) if below.sum() else math.nan

    def weighted(self, name: str, by: str) -> float:
        """Of the last fifth the mean of one column, weighed by another: of ratios that of their sums; NaN without."""
        values, weights = self._recent_both(name, by)
        return float((values * weights).sum() / weights.sum()) if weights.sum() else math.nan

    def _recent_both(self, first: str, second: str) -> tuple[Float64Array, Float64Array]:
        values, weights = self.column(first), self.column(second)
        there = np.isfinite(values) & np.isfinite(weights)
        recent = slice(-window(int(there.sum())), None)
        return values[there][recent], weights[there][recent]

    def last(self, name: str) -> float:
        """The newest number of the column; NaN when there is none."""
        values = self.points(name)[1]
        return float(values[-1]) if len(values) else math.nan


@dataclass(frozen=True, slots=True)
class ModeSpan:
    """A stretch of iterations that ran in one mode, without gaps: it reaches to where the next one starts."""

    start: float
    end: float
    mode: str


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """Something that was changed while training, from what to what, and why; `policy` is "" for the whole run."""

    iteration: float
    policy: str
    what: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with the ends of its confidence interval; NaN where not recorded."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class EvaluationPoint:
    """One measurement on held-out episodes: the policy, the base model alone on the same, and games won of all.

    `questions`: how many different ones the episodes were about; `few` where they are too few to say much of others.
    """

    iteration: float
    policy: str
    opponent: str
    score: Estimate
    base: Estimate
    win: Estimate
    episodes: float
    questions: float
    few: bool


@dataclass(frozen=True, slots=True)
class Lead:
    """Whose held-out score is the best; only where it is `apart` from every other is it surely the best policy."""

    policy: str
    apart: bool
    rival: str
    lead: Estimate


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What ran. `sample` is true when any record is sample data: whoever shows the run must say so."""

    task: str
    mode: str
    seed: str
    base_model: str
    sample: bool


@dataclass(frozen=True, slots=True)
class ArenaSeries:
    """Everything recorded of one run, by policy and by iteration; what was not recorded is empty.

    `system` is a table over seconds since the first record; all other tables are over iterations.
    """

    facts: RunFacts
    policies: tuple[str, ...]
    tables: Mapping[str, SeriesTable]
    credit: Mapping[str, SeriesTable]
    rating: Mapping[str, SeriesTable]
    team: SeriesTable
    timing: SeriesTable
    system: SeriesTable
    evaluations: tuple[EvaluationPoint, ...]
    leader: Lead | None
    decisions: tuple[DecisionPoint, ...]
    modes: tuple[ModeSpan, ...]

    @property
    def iterations(self) -> tuple[float, float]:
        """The first and the last iteration of any table; (0, 0) when there is none."""
        axes = [table.x for table in (*self.tables.values(), self.team, self.timing) if len(table)]
        return (min(float(x[0]) for x in axes), max(float(x[-1]) for x in axes)) if axes else (0.0, 0.0)

    def final_evaluations(self) -> tuple[EvaluationPoint, ...]:
        """The newest evaluation of every policy against every opponent, in the order of `policies`."""
        newest = {(point.policy, point.opponent): point for point in self.evaluations}
        return tuple(point for policy in self.policies for key, point in newest.items() if key[0] == policy)


def arena_series(records: Iterable[Record]) -> ArenaSeries:
    """Sort the records of one run; a later record replaces an earlier one of the same policy and iteration.

    Unknown kinds and fields are left out, missing ones give empty tables. Raises NoRecordsError when no record is one
    of an arena run.
    """
    by_kind = _by_kind(records)
    start = min(_number(record.get("at")) for group in by_kind.values() for record in group)
    system = [{**record, "iteration": round(_number(record.get("at")) - start, 3)} for record in by_kind["system"]]
    policies = _policies(by_kind)
    run: Record = by_kind["run"][-1] if by_kind["run"] else {}
    sample = any(record.get("sample") is True for group in by_kind.values() for record in group)
    return ArenaSeries(
        facts=RunFacts(**_texts(run, "task", "mode", "seed", "base_model"), sample=sample),
        policies=policies,
        tables=_tables(by_kind["policy"], policies),
        credit=_tables(by_kind["credit"], policies),
        rating=_tables(by_kind["rating"], policies),
        team=_table(by_kind["team"]),
        timing=_table(by_kind["timing"]),
        system=_table(system),
        evaluations=_evaluations(by_kind["evaluation"]),
        leader=_lead(by_kind["leader"][-1]) if by_kind["leader"] else None,
        decisions=_decisions(by_kind["decision"]),
        modes=_mode_spans([*by_kind["team"], *by_kind["policy"]]),
    )


def window(count: int) -> int:
    """How many of `count` values are the recent ones: a fifth, or five where that is at most a third; at least one."""
    return min(count, max(1, count // 5, min(5, count // 3)))


def smoothed(values: Float64Array, span: float) -> Float64Array:
    """Exponential moving average of about `span` values, (n,) -> (n,), without the usual pull towards the start.

    Each value is the weighted mean of those up to it, with weights (1 - 2 / (span + 1)) ** age.
    """
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    out = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[index] = total / weight
    return out


def smoothing_span(series: ArenaSeries) -> int:
    """About how many iterations the bold curves average over: a fifteenth of the run, 3 to 25."""
    first, last = series.iterations
    return int(min(25, max(3, (last - first + 1) // 15)))


def _by_kind(records: Iterable[Record]) -> dict[str, list[Record]]:
    by_kind: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_kind[str(record.get("kind"))].append(record)
    if by_kind.keys().isdisjoint(KINDS):
        got = f"only records of kind {', '.join(sorted(by_kind))}" if by_kind else "none"
        raise NoRecordsError(f"no records of an arena run, got {got}; train one, or make sample data")
    return {kind: by_kind[kind] for kind in KINDS}


def _number(value: RecordValue) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _text(value: RecordValue) -> str:
    """A word for people; a number short enough for a label."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _texts(record: Record, *names: str) -> dict[str, str]:
    return {name: _text(record.get(name)) for name in names}


def _policies(by_kind: Mapping[str, Sequence[Record]]) -> tuple[str, ...]:
    """In the order of the run's own list, then those that turned up later (copies made by selection)."""
    named: dict[str, None] = {}
    for run in by_kind["run"]:
        named |= dict.fromkeys(name.strip() for name in _text(run.get("policies")).split(",") if name.strip())
    for kind in ("policy", "rating", "credit", "evaluation", "leader"):
        named |= dict.fromkeys(_text(record.get("policy")) for record in by_kind[kind] if record.get("policy"))
    return tuple(named)


def _tables(records: Sequence[Record], policies: Sequence[str]) -> dict[str, SeriesTable]:
    return {policy: _table([record for record in records if record.get("policy") == policy]) for policy in policies}


def _table(records: Iterable[Record]) -> SeriesTable:
    rows: dict[float, dict[str, float]] = {}
    for record in records:
        iteration = _number(record.get("iteration"))
        if math.isfinite(iteration):
            # Field by field: two kinds of evaluation of one iteration may each carry half of the columns.
            row = rows.setdefault(iteration, {})
            row |= {key: _number(value) for key, value in record.items() if key not in ("at", "kind", "iteration")}
    order = sorted(rows)
    names = dict.fromkeys(name for iteration in order for name in rows[iteration])
    columns = {name: np.array([rows[iteration].get(name, math.nan) for iteration in order]) for name in names}
    columns = {name: column for name, column in columns.items() if np.isfinite(column).any()}
    return SeriesTable(np.array(order, dtype=np.float64), columns)


def _in_order(records: Iterable[Record]) -> list[Record]:
    """The records that name their iteration, in its order."""
    placed = [record for record in records if math.isfinite(_number(record.get("iteration")))]
    return sorted(placed, key=lambda record: _number(record["iteration"]))


def _evaluations(records: Iterable[Record]) -> tuple[EvaluationPoint, ...]:
    return tuple(
        EvaluationPoint(
            iteration=_number(record["iteration"]),
            **_texts(record, "policy", "opponent"),
            score=_estimate(record, "score", "low", "high"),
            base=_estimate(record, "base_score", "base_low", "base_high"),
            win=_estimate(record, "win_rate", "win_low", "win_high"),
            episodes=_number(record.get("episodes")),
            questions=_number(record.get("questions")),
            few=record.get("few") is True,
        )
        for record in _in_order(records)
    )


def _lead(record: Record) -> Lead:
    lead, apart = _estimate(record, "lead", "lead_low", "lead_high"), record.get("apart") is True
    return Lead(**_texts(record, "policy", "rival"), apart=apart, lead=lead)


def _estimate(record: Record, *names: str) -> Estimate:
    return Estimate(*(_number(record.get(name)) for name in names))


def _decisions(records: Iterable[Record]) -> tuple[DecisionPoint, ...]:
    names = ("policy", "what", "before", "after", "reason")
    return tuple(DecisionPoint(_number(r["iteration"]), **_texts(r, *names)) for r in _in_order(records))


def _mode_spans(records: Iterable[Record]) -> tuple[ModeSpan, ...]:
    modes = {_number(record["iteration"]): _text(record.get("mode")) for record in _in_order(records)}
    bands = [(mode, list(places)) for mode, places in groupby(modes, key=modes.__getitem__) if mode]
    ends = [places[0] - 0.5 for _, places in bands[1:]] + [places[-1] + 0.5 for _, places in bands[-1:]]
    return tuple(ModeSpan(places[0] - 0.5, end, mode) for (mode, places), end in zip(bands, ends, strict=True))

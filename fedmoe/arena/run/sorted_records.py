"""Records of a run, grouped by policy and kind in one pass over the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedmoe.runtime.records import Record, RecordValue

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

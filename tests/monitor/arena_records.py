"""Records for tests of what is shown of an arena run."""

from __future__ import annotations

from fedmoe.monitor.arena_series import ArenaSeries, arena_series
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import Record


def real(records: list[Record]) -> list[Record]:
    """The same as if they had been measured."""
    return [{key: value for key, value in record.items() if key != "sample"} for record in records]


def series_of(policies: int = 3, iterations: int = 20) -> ArenaSeries:
    """A made-up run, shown as a real one."""
    return arena_series(real(sample_records(policies, iterations)))


def without(kind: str) -> list[Record]:
    """A made-up run in which one kind of record is missing."""
    return [record for record in sample_records(3, 12) if record["kind"] != kind]

"""Is this file fit for training? Answered from the file alone, before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedmoe.datasets.data_source import open_source
from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import RowFormat, Sample, accepted_shapes, detect_format, ignored_keys, normalise
from fedmoe.datasets.rows import BadRow, Row

MAX_BAD_FRACTION = 0.01
BAD_ROWS_KEPT = 100
BAD_ROWS_SHOWN = 10
IGNORED_KEPT = 32


@dataclass(frozen=True)
class CheckReport:
    """What was found in one data file; `bad` holds the first `BAD_ROWS_KEPT` of `bad_count` bad rows."""

    path: str
    sha256: str
    format: str | None
    rows: int
    good: int
    bad: tuple[BadRow, ...]
    ignored: tuple[str, ...]
    first_keys: tuple[str, ...]
    max_bad_fraction: float

    @property
    def bad_count(self) -> int:
        return self.rows - self.good

    @property
    def problem(self) -> str | None:
        """Why training refuses the file and what to do, or None if it is fit."""
        if self.format is None:
            keys = f"the first row has {list(self.first_keys)}" if self.first_keys else "no row could be read"
            return f"{self.path}: no known row format ({keys}); accepted are\n{accepted_shapes()}{self._bad_lines()}"
        if not self.good:
            return f"{self.path}: not one of {self.rows:,} rows can be used{self._bad_lines()}"
        if self.bad_count > self.max_bad_fraction * self.rows:
            share = self.bad_count / self.rows
            return (
                f"{self.path}: {self.bad_count:,} of {self.rows:,} rows are bad ({share:.1%}, allowed are "
                f"{self.max_bad_fraction:.1%}); mend or remove them{self._bad_lines()}"
            )
        return None

    @property
    def text(self) -> str:
        """The report for people."""
        if self.problem:
            return self.problem
        ignored = f"\n  not used: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.path}: {self.good:,} of {self.rows:,} rows fit, format {self.format}{ignored}{self._bad_lines()}"

    def to_json(self) -> dict[str, object]:
        """JSON types only."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "format": self.format,
            "rows": self.rows,
            "good": self.good,
            "bad_count": self.bad_count,
            "bad": [{"file": row.file, "line": row.line, "reason": row.reason} for row in self.bad],
            "ignored": list(self.ignored),
            "ok": self.problem is None,
            "problem": self.problem,
        }

    def _bad_lines(self) -> str:
        lines = [f"\n  {row.place}: {row.reason}" for row in self.bad[:BAD_ROWS_SHOWN]]
        more = self.bad_count - len(lines)
        return "".join(lines) + (f"\n  and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class LoadedFile:
    """The usable samples of a file, in its order, and the report that names what was left out."""

    samples: tuple[Sample, ...]
    report: CheckReport


def check_file(path: Path, max_bad_fraction: float = MAX_BAD_FRACTION) -> CheckReport:
    """The report on one file; raises `DataError` only where there is nothing to report on (missing, empty, ...)."""
    return _scan(path, max_bad_fraction, None)


def load_rows(path: Path, max_bad_fraction: float = MAX_BAD_FRACTION) -> LoadedFile:
    """The samples of a file; raises `DataError` if none is usable or more than `max_bad_fraction` are bad."""
    samples: list[Sample] = []
    report = _scan(path, max_bad_fraction, samples)
    if report.problem:
        raise DataError(report.problem)
    return LoadedFile(tuple(samples), report)


class _Scan:
    """The state of one pass: the file's format is that of its first row with known keys."""

    def __init__(self) -> None:
        self.format: RowFormat | None = None
        self.rows = 0
        self.good = 0
        self.bad: list[BadRow] = []
        self.ignored: set[str] = set()
        self.first_keys: tuple[str, ...] = ()

    def take(self, row: Row | BadRow) -> Sample | None:
        self.rows += 1
        result = self._result(row)
        if isinstance(result, BadRow):
            if len(self.bad) < BAD_ROWS_KEPT:
                self.bad.append(result)
            return None
        self.good += 1
        return result

    def _result(self, row: Row | BadRow) -> Sample | BadRow:
        if isinstance(row, BadRow):
            return row
        self.first_keys = self.first_keys or tuple(str(key)[:40] for key in list(row.fields)[:8])
        self.format = self.format or detect_format(row)
        if self.format is None:
            return BadRow(row.line, "no known format", row.file)
        if len(self.ignored) < IGNORED_KEPT:
            self.ignored |= ignored_keys(self.format, row)
        sample = normalise(self.format, row)
        return replace(sample, file=row.file) if isinstance(sample, BadRow) else sample


def _scan(path: Path, max_bad_fraction: float, keep: list[Sample] | None) -> CheckReport:
    if not 0 <= max_bad_fraction < 1:
        raise DataError(f"max_bad_fraction must be at least 0 and below 1, got {max_bad_fraction}")
    scan = _Scan()
    source = open_source(path)
    for row in source.rows():
        sample = scan.take(row)
        if sample is not None and keep is not None:
            keep.append(sample)
    return CheckReport(
        path=str(path),
        sha256=source.fingerprint(),
        format=scan.format.name if scan.format else None,
        rows=scan.rows,
        good=scan.good,
        bad=tuple(scan.bad),
        ignored=tuple(sorted(scan.ignored)[:IGNORED_KEPT]),
        first_keys=scan.first_keys,
        max_bad_fraction=max_bad_fraction,
    )

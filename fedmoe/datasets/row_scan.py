"""Converts rows to samples, counts those left out by reason, and chooses the held-out rows that are not trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmoe.datasets.formats.row_formats import KNOWN_COLUMNS, convert, detect_format, keys_not_used, keys_obeyed
from fedmoe.datasets.formats.samples import Sample
from fedmoe.datasets.formats.turns import with_decoded_turns
from fedmoe.datasets.formats.values import RowError, RowLeftOutError, some_keys
from fedmoe.datasets.readers.common import BadRow, DataError, DataRow
from fedmoe.datasets.readers.data_source import DataSource, open_source
from fedmoe.datasets.report import BAD_ROWS_KEPT, MAX_BAD_FRACTION, DataReport, TokenCounts

_KEYS_KEPT = 32
_FIRST_ROWS = 1000
#: One number a row, drawn from its content.
RowHashes = NDArray[np.uint64]


def row_hash(sample: Sample) -> int:
    """64 bits of a row's content, wherever it stands; equal rows have equal ones.

    The names of the sample's classes and fields are part of it, so they must not change.
    """
    content = repr(replace(sample, line=0, file="")).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def held_out_rows(hashes: RowHashes, fraction: float) -> NDArray[np.bool_]:
    """Which of these rows are among the `fraction` (0 to 1) that is held out; raises `DataError` for an empty side.

    Chosen by their content, so that a row never changes sides when data grow.
    """
    held_out = hashes.astype(np.float64) < fraction * 2.0**64
    if held_out.all() or not held_out.any():
        empty = "nothing to train on" if held_out.any() else "no row held out"
        raise DataError(
            f"--eval-split {fraction:g} leaves {empty} of {len(set(hashes.tolist()))} different rows; "
            "give another fraction, more data, or --eval-dataset FILE"
        )
    return held_out


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How rows are read: columns under other names, as `(column, name)`, and the share of rows that may be bad."""

    columns: tuple[tuple[str, str], ...] = ()
    max_bad_fraction: float = MAX_BAD_FRACTION

    @classmethod
    def mapping(cls, columns: Sequence[str]) -> RowOptions:
        """Columns under other names, each as `COLUMN=NAME`; raises `DataError` for one that is written otherwise."""
        pairs = [text.rpartition("=") for text in columns]
        for text, (column, _, name) in zip(columns, pairs, strict=True):
            if not column or not name:
                raise DataError(f"--map takes COLUMN=NAME, for example question=prompt; got {text!r}")
        return cls(tuple((column, name) for column, _, name in pairs))

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction < 1:
            raise DataError(f"max_bad_fraction must be at least 0 and below 1, got {self.max_bad_fraction}")
        columns, names = [column for column, _ in self.columns], [name for _, name in self.columns]
        if unknown := sorted(set(names) - KNOWN_COLUMNS):
            raise DataError(
                f"--map gives a column the name {unknown[0]!r}, which no format has; names are "
                f"{', '.join(sorted(KNOWN_COLUMNS))}"
            )
        for what, words in (("column", columns), ("name", names)):
            if repeated := sorted({word for word in words if words.count(word) > 1}):
                raise DataError(f"--map has the {what} {repeated[0]!r} twice; map each once")


def check_file(name: str | Path, options: RowOptions | None = None) -> DataReport:
    """The report on data without a tokenizer; raises `DataError` where there is nothing to report on."""
    scan = RowScan(name, options or RowOptions())
    for _ in scan.samples():
        pass
    return scan.report()


def check_beginning(name: str | Path, options: RowOptions | None = None) -> None:
    """Raise `DataError` where the first rows show that data are not fit; quick, however large they are.

    Small data are judged whole; of larger ones it is enough that one of the first rows can be used.
    """
    scan = RowScan(name, options or RowOptions())
    usable = sum(1 for _ in scan.samples(_FIRST_ROWS))
    if not usable or scan.rows < _FIRST_ROWS:
        scan.report().raise_problem()


class RowScan:
    """One pass over the rows of a source, each read by its own keys."""

    def __init__(self, name: str | Path, options: RowOptions) -> None:
        self._options = options
        self._names = dict(options.columns)
        self.source: DataSource = open_source(name, KNOWN_COLUMNS | set(self._names))
        #: File and line of every sample given out, and what it holds as a number, in order.
        self.places: list[tuple[str, int]] = []
        self.hashes: list[int] = []
        #: Rows seen so far.
        self.rows = self._rejected = self._bad_count = 0
        self._formats: Counter[str] = Counter()
        self._marked_out: Counter[str] = Counter()
        self._bad: list[BadRow] = []
        self._ignored: set[str] = set()
        self._obeyed: set[str] = set()
        self._first_keys: tuple[str, ...] = ()
        self._mapped: set[str] = set()

    def samples(self, rows: int | None = None) -> Iterator[Sample]:
        """The usable ones among the first `rows` rows (None: all) as samples, in their order."""
        for row in islice(self.source.rows(), rows):
            self.rows += 1
            try:
                sample = self._sample(row)
            except RowLeftOutError as error:
                self._marked_out[str(error)] += 1
            except RowError as error:
                self._bad_count += 1
                if len(self._bad) < BAD_ROWS_KEPT:
                    self._bad.append(BadRow(row.line, str(error), row.file))
            else:
                self.places.append((sample.file, sample.line))
                self.hashes.append(row_hash(sample))
                yield sample
        missing = sorted(set(self._names) - self._mapped)
        if missing and (rows is None or self.rows < rows):
            keys = f"the first row has {list(self._first_keys)}" if self._first_keys else "no row could be read"
            raise DataError(f"{self.source.name}: --map names the column {missing[0]!r}, which no row has; {keys}")

    def report(self, refused: Sequence[BadRow] = (), tokens: TokenCounts | None = None) -> DataReport:
        """The report on the rows so far; `refused` ones, which passed the scan, count as bad."""
        bad = sorted((*self._bad, *refused), key=lambda row: (row.file, row.line))
        unread = self.source.options.unread
        return DataReport(
            source=self.source.name,
            sha256=self.source.fingerprint(),
            files=len(self.source.files),
            max_bad_fraction=self._options.max_bad_fraction,
            rows=self.rows,
            formats=dict(self._formats),
            bad=tuple(bad[:BAD_ROWS_KEPT]),
            bad_count=self._bad_count + len(refused),
            marked_out=dict(self._marked_out),
            ignored=tuple(sorted(self._ignored | (unread - KNOWN_COLUMNS))[:_KEYS_KEPT]),
            obeyed=tuple(sorted(self._obeyed)),
            rejected=self._rejected,
            first_keys=self._first_keys or tuple(sorted(unread)[:8]),
            notes=self.source.left_out,
            tokens=tokens,
        )

    def _sample(self, row: DataRow | BadRow) -> Sample:
        if isinstance(row, BadRow):
            raise RowError(row.reason)
        self._first_keys = self._first_keys or tuple(str(key)[:40] for key in list(row.fields)[:8])
        row = DataRow(row.line, with_decoded_turns(self._renamed(row.fields)), row.file)
        shape = detect_format(row, self._names.values())
        if shape is None:
            raise RowError(f"no known format; found the keys {some_keys(row.fields)}")
        if len(self._ignored) < _KEYS_KEPT:
            self._ignored |= keys_not_used(shape, row)
        self._obeyed |= keys_obeyed(shape, row)
        self._formats[shape.name] += 1
        rejected = row.fields.get("rejected") is not None and shape.name == "preference"
        try:
            return convert(shape, row)
        except RowError:
            rejected = False
            raise
        finally:
            self._rejected += rejected

    def _renamed(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        if not self._names:
            return fields
        mapped = self._names.keys() & fields.keys()
        self._mapped |= mapped
        taken = {self._names[key] for key in mapped} - mapped
        # A row without the mapped column keeps its own of that name: a file may be made of several data sets.
        self._ignored |= taken & fields.keys()
        return {self._names.get(key, key): value for key, value in fields.items() if key not in taken}

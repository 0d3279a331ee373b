"""Rows of CSV and TSV files: UTF-8, RFC 4180 quotes, the first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedmoe.datasets.readers.common import (
    MAX_COLUMNS,
    BadRow,
    DataError,
    DataRow,
    DataRows,
    ReadOptions,
    bounded_lines,
    too_long,
)
from fedmoe.datasets.readers.compressed import open_plain

NUL = "\0"
SEMICOLONS_TO_COMMAS = (
    """python3 -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter=';'))" """
)
_NAMES = {",": "commas", "\t": "tabs"}
CR_TO_LF = "tr '\\r' '\\n' "


class _BudgetedLines:
    """The lines that feed `csv.reader`, with a budget of bytes for each row.

    An iterator class, not a generator: it must go on after it has raised.
    """

    def __init__(self, file: BinaryIO, max_row_bytes: int) -> None:
        self._lines = bounded_lines(file, max_row_bytes)
        self._max_row_bytes = max_row_bytes
        self.row_bytes = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line, _ = next(self._lines)
        self.row_bytes += len(line) if line is not None else self._max_row_bytes + 1
        if line is None or self.row_bytes > self._max_row_bytes:
            raise csv.Error(f"{too_long(self._max_row_bytes)} (or a quote is never closed)")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise csv.Error(f"not UTF-8 at byte {error.start} of line {self.number}") from None


def read_csv(path: Path, options: ReadOptions) -> DataRows:
    """The rows below the header, separated by commas; a row with too few or too many cells is a `BadRow`."""
    return _read(path, options.max_row_bytes, ",")


def read_tsv(path: Path, options: ReadOptions) -> DataRows:
    """As `read_csv`, separated by tabs."""
    return _read(path, options.max_row_bytes, "\t")


def _read(path: Path, max_row_bytes: int, delimiter: str) -> DataRows:
    # The csv module has one limit for the whole process and it is smaller than our rows; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    with open_plain(path) as file:
        lines = _BudgetedLines(file, max_row_bytes)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        header = _header(path, reader, delimiter)
        while True:
            lines.row_bytes = 0
            first = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(first, str(error))
                continue
            if cells:
                yield _row(first, header, cells, delimiter)


def _header(path: Path, reader: Iterator[list[str]], delimiter: str) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        if "new-line character" in str(error):
            raise DataError(
                f"{path}: its lines end with CR alone, not with LF; write it anew:\n"
                f"  {CR_TO_LF}< {path.name} > lines.csv"
            ) from error
        raise DataError(f"{path}: the header cannot be read: {error}") from error
    if len(header) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(header):,} columns, at most {MAX_COLUMNS} are read; keep those needed")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: columns named more than once: {repeated[:5]}; name each column once")
    if any(NUL in name for name in header):
        raise DataError(f"{path}: the header holds NUL bytes: is the file UTF-16? save it as UTF-8")
    if len(header) == 1:
        _check_delimiter(path, header[0], delimiter)
    return header


def _check_delimiter(path: Path, only: str, delimiter: str) -> None:
    """Refuse a header of one column that holds another separator: a file of another kind, no long column name."""
    if ";" in only:
        raise DataError(
            f"{path}: the header {only[:80]!r} is separated by semicolons, not by {_NAMES[delimiter]}; save it with "
            f"commas:\n  {SEMICOLONS_TO_COMMAS}< {path.name} > commas.csv"
        )
    other = "\t" if delimiter == "," else ","
    if other in only:
        suffix = ".tsv" if other == "\t" else ".csv"
        raise DataError(
            f"{path}: the header {only[:80]!r} is separated by {_NAMES[other]}; rename the file to {suffix}"
        )


def _row(line: int, header: list[str], cells: list[str], delimiter: str) -> DataRow | BadRow:
    if len(cells) != len(header):
        quote = f"quote cells that hold {_NAMES[delimiter]}"
        return BadRow(line, f"{len(cells)} cells, but the header has {len(header)}; {quote}")
    if any(NUL in cell for cell in cells):
        return BadRow(line, "a cell holds a NUL byte; remove it, or save the file as UTF-8 if it is UTF-16")
    return DataRow(line, dict(zip(header, cells, strict=True)))

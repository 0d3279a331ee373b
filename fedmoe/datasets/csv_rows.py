"""Rows of a CSV file: UTF-8, comma-separated, the first line names the columns, RFC 4180 quotes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.lines import MAX_COLUMNS, BadRow, Row, Rows, bounded_lines, too_long


class _Lines:
    """The lines that feed `csv.reader`, with a budget of bytes for each row.

    An iterator class, not a generator: it must go on after it has raised.
    """

    def __init__(self, file: BinaryIO, max_row_bytes: int) -> None:
        self._lines = bounded_lines(file, max_row_bytes)
        self._max_row_bytes = max_row_bytes
        self._row_bytes = 0
        self.number = 0

    def start_row(self) -> None:
        self._row_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line, _ = next(self._lines)
        self._row_bytes += len(line) if line is not None else self._max_row_bytes + 1
        if line is None or self._row_bytes > self._max_row_bytes:
            raise csv.Error(f"{too_long(self._max_row_bytes)} (or a quote is never closed)")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise csv.Error(f"not UTF-8 at byte {error.start} of line {self.number}") from None


def read_csv(path: Path, max_row_bytes: int) -> Rows:
    """The rows below the header; a row with too few or too many cells is a `BadRow`."""
    # The csv module has one limit for the whole process and it is smaller than our rows; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    with path.open("rb") as file:
        lines = _Lines(file, max_row_bytes)
        reader = csv.reader(lines, strict=True)
        header = _header(path, reader)
        while True:
            lines.start_row()
            first = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(first, str(error))
                continue
            if cells:
                yield _row(first, header, cells)


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}: the header cannot be read: {error}") from error
    if len(header) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(header):,} columns, at most {MAX_COLUMNS} are read; keep those needed")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: columns named more than once: {repeated[:5]}; name each column once")
    return header


def _row(line: int, header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow(line, f"{len(cells)} cells, but the header has {len(header)}; quote cells that hold commas")
    return Row(line, dict(zip(header, cells, strict=True)))

"""Rows of text files: JSON lines and JSON arrays; CSV and TSV.

CSV and TSV are UTF-8 with RFC 4180 quotes, and the first line names the columns.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from fedmoe.datasets.readers.common import (
    MAX_COLUMNS,
    UTF8_BOM,
    BadRow,
    DataError,
    DataRow,
    DataRows,
    ReadOptions,
    bounded_lines,
    too_long,
)
from fedmoe.datasets.readers.compressed import head, open_plain

MAX_ARRAY_BYTES = 512 * 1024 * 1024
NUL = "\0"
SEMICOLONS_TO_COMMAS = (
    """python3 -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter=';'))" """
)
CR_TO_LF = "tr '\\r' '\\n' "
_NAMES = {",": "commas", "\t": "tabs"}


def decode_json(text: str) -> object:
    """The value of a JSON text; NaN, infinities and numbers that overflow are errors (`ValueError`)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path: Path, options: ReadOptions) -> DataRows:
    """An object a line; blank lines are skipped."""
    with open_plain(path) as file:
        for number, line, ended in bounded_lines(file, options.max_row_bytes):
            if line is None:
                yield BadRow(number, too_long(options.max_row_bytes))
            elif line.strip():
                try:
                    yield _as_row(number, decode_json(line.decode("utf-8")))
                except UnicodeDecodeError as error:
                    yield BadRow(number, f"not UTF-8 at byte {error.start}")
                except ValueError as error:
                    cut = "" if ended else " (the last line has no newline: was the file cut off?)"
                    yield BadRow(number, f"not JSON: {error}{cut}")


def read_json(path: Path, options: ReadOptions) -> DataRows:
    """An array of objects; a .json file that does not start with `[` is read as JSON lines."""
    if not head(path).removeprefix(UTF8_BOM).lstrip().startswith(b"["):
        yield from read_jsonl(path, options)
        return
    with open_plain(path) as file:
        content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise DataError(f"{path}: a JSON array over {MAX_ARRAY_BYTES:,} bytes must be held whole; convert it to .jsonl")
    try:
        values = decode_json(content.removeprefix(UTF8_BOM).decode("utf-8"))
    except json.JSONDecodeError as error:
        yield BadRow(error.lineno, f"not JSON: {error}; nothing of this array can be read")
        return
    except ValueError as error:
        yield BadRow(1, f"not a JSON array in UTF-8: {error}")
        return
    assert isinstance(values, list)
    for number, value in enumerate(values, start=1):
        yield _as_row(number, value)


def _as_row(number: int, value: object) -> DataRow | BadRow:
    if isinstance(value, dict):
        # A null says that a column of a union of data sets is not there.
        return DataRow(number, {key: item for key, item in value.items() if item is not None})
    names: dict[type, str] = {list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return BadRow(number, f"expected an object like {{...}}, got {names.get(type(value), 'a number')}")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


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


def read_csv(path: Path, options: ReadOptions, delimiter: str = ",") -> DataRows:
    """The rows below the header, separated by commas or tabs; one with too few or too many cells is a `BadRow`."""
    # The csv module has one limit for the whole process and it is smaller than our rows; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), options.max_row_bytes))
    with open_plain(path) as file:
        lines = _BudgetedLines(file, options.max_row_bytes)
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
            if not cells:
                continue
            if len(cells) != len(header):
                quote = f"quote cells that hold {_NAMES[delimiter]}"
                yield BadRow(first, f"{len(cells)} cells, but the header has {len(header)}; {quote}")
            elif any(NUL in cell for cell in cells):
                yield BadRow(first, "a cell holds a NUL byte; remove it, or save the file as UTF-8 if it is UTF-16")
            else:
                yield DataRow(first, dict(zip(header, cells, strict=True)))


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
    # A single column that holds another separator is a file of another kind, no long column name.
    only = header[0] if len(header) == 1 else ""
    if ";" in only:
        raise DataError(
            f"{path}: the header {only[:80]!r} is separated by semicolons, not by {_NAMES[delimiter]}; save it with "
            f"commas:\n  {SEMICOLONS_TO_COMMAS}< {path.name} > commas.csv"
        )
    other, suffix = ("\t", ".tsv") if delimiter == "," else (",", ".csv")
    if other in only:
        raise DataError(
            f"{path}: the header {only[:80]!r} is separated by {_NAMES[other]}; rename the file to {suffix}"
        )
    return header

"""Rows out of JSONL, JSON, CSV and Parquet files, one at a time and in bounded memory.

A row that cannot be read becomes a `BadRow` with its line and a reason, so that one broken line neither stops the
reader nor goes unseen. A file that cannot be read at all raises `DataError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from fedmoe.datasets.csv_rows import read_csv
from fedmoe.datasets.errors import DataError
from fedmoe.datasets.lines import MAX_ROW_BYTES, UTF8_BOM, BadRow, Row, Rows, bounded_lines, too_long
from fedmoe.datasets.parquet_rows import read_parquet

__all__ = ["READERS", "BadRow", "Row", "Rows", "decode_json", "read_rows"]

MAX_ARRAY_BYTES = 512 * 1024 * 1024
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def read_rows(path: Path, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of a .jsonl, .json, .csv or .parquet file in order; blank lines are skipped.

    Raises `DataError` at once if the file is missing, empty or of an unknown kind, and while reading if it turns out
    to hold no row at all, or (Parquet) cannot be decoded.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        kinds = ", ".join(READERS)
        raise DataError(f"{path}: cannot tell how to read {suffix or 'a name without suffix'!r}; rename it to {kinds}")
    _check_readable(path)
    return _at_least_one(path, READERS[suffix](path, max_row_bytes))


def decode_json(text: str) -> object:
    """The value of a JSON text; NaN, infinities and numbers that overflow are errors (`ValueError`)."""
    try:
        return json.loads(text, parse_constant=_not_a_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path, it is relative to {Path.cwd()}")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give one data file, not a folder")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); write at least one row")
    if start.startswith(UTF16_BOMS):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")


def _at_least_one(path: Path, rows: Rows) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: the file holds no rows, only blank lines or a header; write at least one row")


def _read_jsonl(path: Path, max_row_bytes: int) -> Rows:
    with path.open("rb") as file:
        for number, line, ended in bounded_lines(file, max_row_bytes):
            if line is None:
                yield BadRow(number, too_long(max_row_bytes))
            elif line.strip():
                yield _json_row(number, line, ended)


def _json_row(number: int, line: bytes, ended: bool) -> Row | BadRow:
    try:
        return _as_row(number, decode_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8 at byte {error.start}")
    except ValueError as error:
        cut = "" if ended else " (the last line has no newline: was the file cut off?)"
        return BadRow(number, f"not JSON: {error}{cut}")


def _as_row(number: int, value: object) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(number, value)
    return BadRow(number, f"expected an object like {{...}}, got {_kind(value)}")


def _read_json(path: Path, max_row_bytes: int) -> Rows:
    """An array of objects; a .json file that does not start with `[` is read as JSON lines."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(UTF8_BOM).lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(path, max_row_bytes)
        return
    if (size := path.stat().st_size) > MAX_ARRAY_BYTES:
        raise DataError(f"{path}: a JSON array of {size:,} bytes must be held whole; convert it to .jsonl")
    try:
        values = decode_json(path.read_bytes().removeprefix(UTF8_BOM).decode("utf-8"))
    except json.JSONDecodeError as error:
        yield BadRow(error.lineno, f"not JSON: {error}; nothing of this array can be read")
        return
    except ValueError as error:
        yield BadRow(1, f"not a JSON array in UTF-8: {error}")
        return
    assert isinstance(values, list)
    for number, value in enumerate(values, start=1):
        yield _as_row(number, value)


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


READERS: Mapping[str, Callable[[Path, int], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}

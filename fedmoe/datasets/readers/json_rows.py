"""Rows of JSON lines and JSON arrays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from fedmoe.datasets.readers.common import (
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
                yield _json_row(number, line, ended)


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


def _json_row(number: int, line: bytes, ended: bool) -> DataRow | BadRow:
    try:
        return _as_row(number, decode_json(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8 at byte {error.start}")
    except ValueError as error:
        cut = "" if ended else " (the last line has no newline: was the file cut off?)"
        return BadRow(number, f"not JSON: {error}{cut}")


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

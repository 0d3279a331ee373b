"""Rows of JSON lines and of JSON arrays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from fedmoe.datasets.readers.compressed import head, open_plain
from fedmoe.datasets.readers.lines import (
    UTF8_BOM,
    BadRow,
    DataError,
    Reading,
    Row,
    Rows,
    bounded_lines,
    too_long,
    without_nulls,
)

MAX_ARRAY_BYTES = 512 * 1024 * 1024


def decode_json(text: str) -> object:
    """The value of a JSON text; NaN, infinities and numbers that overflow are errors (`ValueError`)."""
    try:
        return json.loads(text, parse_constant=_not_a_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path: Path, reading: Reading) -> Rows:
    """An object a line; blank lines are skipped."""
    with open_plain(path) as file:
        for number, line, ended in bounded_lines(file, reading.max_row_bytes):
            if line is None:
                yield BadRow(number, too_long(reading.max_row_bytes))
            elif line.strip():
                yield _json_row(number, line, ended)


def read_json(path: Path, reading: Reading) -> Rows:
    """An array of objects; a .json file that does not start with `[` is read as JSON lines."""
    if not head(path).removeprefix(UTF8_BOM).lstrip().startswith(b"["):
        yield from read_jsonl(path, reading)
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
        return Row(number, without_nulls(value))
    return BadRow(number, f"expected an object like {{...}}, got {_kind(value)}")


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

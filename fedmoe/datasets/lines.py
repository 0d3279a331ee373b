"""What every reader shares: the row types, the limits, and lines of bounded length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_COLUMNS = 1024
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `line` counts from 1 (the line in JSONL and CSV, the item in a JSON array, the row in Parquet)."""

    line: int
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that training cannot use, and why; `line` counts like `Row.line`."""

    line: int
    reason: str


Rows = Iterator[Row | BadRow]


def bounded_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None, bool]]:
    """`(number, line, ended)` for each line: None for one longer than `max_bytes`, `ended` if a newline closed it."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        too_long = len(line) > max_bytes
        while too_long and not line.endswith(b"\n") and (line := file.readline(max_bytes + 1)):
            pass
        yield number, None if too_long else line, line.endswith(b"\n")


def too_long(max_bytes: int) -> str:
    """The reason given for a row over the size limit."""
    return f"longer than {max_bytes:,} bytes; split it into several rows"

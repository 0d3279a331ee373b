"""Types and limits that all readers share: rows, bad rows, read options, lines of bounded length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO


class DataError(ValueError):
    """Data that training cannot use; the message says what is wrong, what was found and what to do."""


MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_COLUMNS = 1024
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row; `line` counts from 1.

    It is the line in JSONL and CSV, the item in a JSON array, the row in Parquet and Arrow.
    `file` is its file's path inside a folder, empty for a single file. A field that is null in the file is not there.
    """

    line: int
    fields: Mapping[str, object]
    file: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that training cannot use, and why; `line` and `file` are those of `DataRow`."""

    line: int
    reason: str
    file: str = ""

    @property
    def place(self) -> str:
        """Where the row stands, for people: `line 3`, or `part-2.jsonl line 3` inside a folder."""
        return f"{self.file} line {self.line}" if self.file else f"line {self.line}"


DataRows = Iterator[DataRow | BadRow]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a file is read: the columns of Parquet and Arrow to read (None: all), and the limit of one row's bytes.

    `unread` is filled while reading: the columns that were there and not read.
    """

    columns: Collection[str] | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    unread: set[str] = field(default_factory=set)


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

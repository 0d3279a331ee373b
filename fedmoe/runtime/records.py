"""Records: an append-only file of JSON lines, written by runs and read by charts and live views."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

RecordValue = str | int | float | bool | None
Record = Mapping[str, RecordValue]


class Recorder(Protocol):
    """Keeps records: a `RecordWriter`, or whatever stands before one."""

    def write(self, kind: str, **values: RecordValue) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Release what is held."""


class RecordWriter:
    """Appends JSON lines to a file, in one write, so that a reader never sees half a line from one writer.

    Every record carries `at` (seconds since 1970) and `kind`; numbers that JSON has no word for become null. Raises
    OSError when the disk does not take a record whole.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._path = path
        self._clock = clock
        # A crash of the machine can leave half a line: end it, so that it spoils itself only and not the next.
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._append(b"\n")

    def write(self, kind: str, **values: RecordValue) -> None:
        """Append one record."""
        self.write_many([self.stamped(kind, values)])

    def stamped(self, kind: str, values: Record) -> Record:
        """A record of this moment, to be written later with `write_many`."""
        record: dict[str, RecordValue] = {"at": round(self._clock(), 3), "kind": kind, **values}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }

    def write_many(self, records: Iterable[Record]) -> None:
        """Append records that `stamped` made, in one write."""
        self._append("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())

    def sync(self) -> int:
        """Make everything written durable; returns the length of the file in bytes."""
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def read_records(path: Path) -> Iterator[Record]:
    """All whole records of a file; a line cut by a crash, or still being written, is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if (record := _record_of(line)) is not None:
                yield record


class RecordFile:
    """The records of a file that grows: each is read once, unless the file is replaced or cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[Record] = []
        self._file = (0, 0)
        self._end = 0

    def exists(self) -> bool:
        """Whether there is a file."""
        return self._path.is_file()

    def all(self) -> list[Record]:
        """All whole records until now; raises FileNotFoundError."""
        with self._path.open("rb") as lines:
            status = os.fstat(lines.fileno())
            if (status.st_dev, status.st_ino) != self._file or status.st_size < self._end:
                self._records, self._end = [], 0
                self._file = (status.st_dev, status.st_ino)
            lines.seek(self._end)
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # still being written, or cut by a crash
                self._end += len(line)
                if (record := _record_of(line)) is not None:
                    self._records.append(record)
        return self._records


def _record_of(line: bytes) -> Record | None:
    """The record in a whole line; None where it is none."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None

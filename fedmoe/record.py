"""One append-only stream of records: whoever measures writes it, whoever shows reads it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Value = str | int | float | bool | None
Record = Mapping[str, Value]


class RecordWriter:
    """Appends JSON lines to a file, one write each, so that a reader never sees half a line from one writer.

    Every record carries `at` (seconds since 1970) and `kind`; numbers that JSON has no word for become null.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._clock = clock

    def write(self, kind: str, **values: Value) -> None:
        """Append one record."""
        record = {"at": round(self._clock(), 3), "kind": kind}
        record |= {key: _plain(value) for key, value in values.items()}
        os.write(self._descriptor, (json.dumps(record, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def _plain(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> Iterator[Record]:
    """All complete records of a file; a last line that is still being written is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)

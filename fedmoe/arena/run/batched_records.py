"""Buffered records: one write per iteration instead of one per record; no duplicates after a resume."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

import structlog

from fedmoe.runtime.records import Record, RecordValue, RecordWriter

_log = structlog.get_logger("fedmoe.arena")


class BatchedRecords:
    """Keeps records in memory until `flush`; a killed process loses at most those since the last one.

    Threads may share it. A context manager: it flushes and closes at the end, also after an error.
    """

    def __init__(self, writer: RecordWriter, most: int = 10_000) -> None:
        self._writer = writer
        self._most = most
        self._waiting: list[Record] = []
        self._closed = False
        self._lock = threading.Lock()

    def write(self, kind: str, **values: RecordValue) -> None:
        """Keep one record of this moment; flushes by itself only when very many wait."""
        with self._lock:
            self._waiting.append(self._writer.stamped(kind, values))
            if len(self._waiting) >= self._most:
                self._flush()

    def flush(self) -> None:
        """Write what waits, in one write: at the end of an iteration. Raises OSError when the disk is full."""
        with self._lock:
            self._flush()

    def sync(self) -> int:
        """Flush and make durable; returns the length of the file in bytes, for the checkpoint."""
        with self._lock:
            self._flush()
            return self._writer.sync()

    def close(self) -> None:
        """Flush and release the file; does nothing the second time, since whoever watches a run closes it too."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._flush()
            finally:
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self) -> None:
        # Let go first: after a write that failed halfway a second try would double its first half.
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._writer.write_many(waiting)


def truncate_records(path: Path, length: int) -> int:
    """Cut a file of records to `length` bytes, before anybody opens it: a resumed run repeats what came after.

    Returns how many bytes went. A file that is shorter, because the machine lost its end, is left and logged.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        _log.warning("records_shorter_than_checkpoint", file=str(path), bytes=size, expected=length)
    if size <= length:
        return 0
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size - length
